"""Results of evaluation harnesses outside this project, run on the served parent and the served child."""

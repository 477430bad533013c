"""The stage that measures the damage of every variant of every block; the mathematics is in scoring.py."""

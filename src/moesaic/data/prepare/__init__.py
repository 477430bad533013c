"""Public sets and a user's own files to the data sets of a run; start in run.py. Formats: docs/data.md."""

"""Data sets in, token batches and verified answers out; start in sets.py, which names the files of a run."""

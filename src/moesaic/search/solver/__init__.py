"""The exact solver of the search's integer program; start in decomposition.py."""

"""The stage that chooses one block per layer under all limits; the method is in search.py."""

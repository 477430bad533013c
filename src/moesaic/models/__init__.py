"""Families of models as values, tensors and files; start in architecture.py, then layout.py and checkpoint.py."""

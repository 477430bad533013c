"""The stage that cuts the child checkpoint out of its parent; the tensor operations are in pruning.py."""

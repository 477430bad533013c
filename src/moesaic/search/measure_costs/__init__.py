"""The stage that measures or models the cost of every variant; run.py decides which, block_timing.py measures."""

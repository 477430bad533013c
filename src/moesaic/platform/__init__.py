"""Everything outside the method: the store, runs and their records, the model registry, and clusters."""

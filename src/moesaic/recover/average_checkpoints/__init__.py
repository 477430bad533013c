"""The weighted mean of policies that were trained from one checkpoint."""

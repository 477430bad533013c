"""The gpt-oss family as values, tensors and files; start in architecture.py, then gpt_oss.py and checkpoint.py."""

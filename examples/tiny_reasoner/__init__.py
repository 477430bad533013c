"""A small gpt-oss model trained from nothing to reason at three efforts."""

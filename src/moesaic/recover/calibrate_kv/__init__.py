"""Scales of an FP8 KV cache, calibrated on conversations."""

"""Moesaic: deployment-optimised mixture-of-experts reasoning models by block-wise architecture search."""

__version__ = "0.1.0"

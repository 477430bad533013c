"""The images that components run in: one per runtime, one immutable tag per release, both named here once."""

TAG = "0.1.0"
REGISTRY = "moesaic"

SEARCH = f"{REGISTRY}/search:{TAG}"
"""torch, transformers, HiGHS, matplotlib: everything from ranking to the report."""

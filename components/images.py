"""The images that components run in: one per runtime, one immutable tag per release, all named here once."""

TAG = "0.1.0"
REGISTRY = "moesaic"

SEARCH = f"{REGISTRY}/search:{TAG}"
"""torch, transformers, HiGHS, matplotlib: ranking to pruning, evaluation, averaging, the report."""
TRAIN = f"{REGISTRY}/train:{TAG}"
"""NeMo AutoModel and nemo_toolkit: distillation."""
RL = f"{REGISTRY}/rl:{TAG}"
"""TRL, or NeMo-RL: reinforcement learning."""
KV = f"{REGISTRY}/kv:{TAG}"
"""NVIDIA ModelOpt: calibration of the KV cache."""

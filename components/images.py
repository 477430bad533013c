"""The images that components run in: one per runtime, all named here once.

``make build-images`` leaves the digests of what it built and pushed in ``images/lock.json``, and then these are meant;
without that file, a tag that nothing may stand behind yet: on one machine, components run without images.
"""

import json
from pathlib import Path

LOCK = Path(__file__).parents[1] / "images" / "lock.json"
TAG = "0.1.0"
"""Of the images where there is no lock."""


def reference(runtime: str, lock: Path = LOCK) -> str:
    """The image of a runtime, by digest if it was built."""
    if not lock.is_file():
        return f"moesaic/{runtime}:{TAG}"
    image: str = json.loads(lock.read_text())["images"][runtime]["image"]
    return image


SEARCH = reference("search")
"""torch, transformers, HiGHS, matplotlib: ranking to pruning, evaluation, averaging, the report."""
TRAIN = reference("train")
"""NeMo AutoModel and nemo_toolkit: distillation."""
RL = reference("rl")
"""TRL, or NeMo-RL: reinforcement learning."""
SERVE = reference("serve")
"""TensorRT-LLM: serving, and benchmarks of what is served."""
CPU = reference("cpu")
"""Everything, without a GPU: for small clusters, whose profile names it for all stages."""
KV = reference("kv")
"""NVIDIA ModelOpt: calibration of the KV cache."""

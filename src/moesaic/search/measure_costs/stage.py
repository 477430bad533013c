"""Finds memory and runtime of every variant under every workload, measured on this device or computed from a hardware
table.
"""

from typing import Literal

from moesaic.core.config import CacheDtype, Config, Positive, Precision
from moesaic.core.stage import Stage, artifact, model
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.costs.workload import Workload
from moesaic.search.space import SearchSpace


class MeasureCostsConfig(Config):
    """Memory and runtime of every variant under every workload."""

    space: SearchSpace
    """The variants to cost."""
    workloads: tuple[Workload, ...]
    """What the child will serve."""
    source: Literal["measure", "model"] = "measure"
    """Time blocks on this device, or compute them from a hardware table."""
    hardware: str = "h100"
    """Hardware table for ``source: model``."""
    num_gpus: Positive = 1
    """GPUs the model is spread over: attention by tensor parallelism, experts as said next."""
    expert_parallel: bool = False
    """Whether every GPU holds a share of the experts whole, instead of a share of every expert."""
    engine: TargetEngine = "moesaic"
    """The serving engine; memory pays for KV cache as its allocator does."""
    kv_cache: CacheDtype = "bf16"
    """Element type of the KV cache."""
    repeats: Positive = 5
    """Timings of each block; the median counts."""
    precision: Precision = "float32"
    """What timed blocks compute in."""


STAGE = Stage(
    name="measure_costs",
    config=MeasureCostsConfig,
    runtime="search",
    inputs=(model("parent", "its shape and weights are timed"),),
    outputs=(artifact("costs", "`costs.json`: a row per distinct block, each marked measured or modelled"),),
)

"""Finds memory and runtime of every variant under every workload, measured on this device, in process or in the serving
engine, or computed from a hardware table.
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
    """Time blocks on this device, in the engine where it is `vllm` or else in process, or compute them from a hardware
    table."""
    hardware: str = "h100"
    """Hardware table for ``source: model``."""
    num_gpus: Positive = 1
    """GPUs the model is spread over: attention by tensor parallelism, experts as said next."""
    expert_parallel: bool = False
    """Whether every GPU holds a share of the experts whole, instead of a share of every expert."""
    engine: TargetEngine = "moesaic"
    """The serving engine; memory pays for KV cache as its allocator does, and `vllm` times its own layers."""
    kv_cache: CacheDtype = "bf16"
    """Element type of the KV cache."""
    repeats: Positive = 5
    """Timings of each block, in the engine twice as many; the median counts."""
    timed_layers: Positive = 4
    """Layers of the smaller of the two models in which the engine times a block; the other has twice as many, and a GPU
    must hold both."""
    precision: Precision = "float32"
    """What blocks that are timed in process compute in; an engine computes in bfloat16."""


STAGE = Stage(
    name="measure_costs",
    config=MeasureCostsConfig,
    runtime="search",
    inputs=(model("parent", "its shape and weights are timed"),),
    outputs=(artifact("costs", "`costs.json`: a row per distinct block, each with what its times come from"),),
    alone=True,
)

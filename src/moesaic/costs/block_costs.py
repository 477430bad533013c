"""The cost of a block, and of an assembly of blocks (paper B, its MIP).

*Size* is parameters or bytes, *runtime* is milliseconds of prefill and of a decode step, and *cost* is both together.
*Throughput* is output tokens per second and follows from an assembly's runtime.

Weights and KV cache of a block follow from shapes alone. With ``B`` concurrent requests of ``s`` tokens::

    memory      = sum_i weights(i) + B * sum_i kv(i, s),     kv(i, s) = held(i, s) * kv_elements * element_bytes
    throughput  = B * output_tokens / (sum_i prefill(i) + output_tokens * sum_i decode(i))
    latency     = sum_i decode(i)

where ``prefill(i)`` is the time in which block ``i`` reads the prompts of all ``B`` requests, ``decode(i)`` its time
for one step of all of them at their mean context, and every sum includes the fixed part: embedding, norm and head.
``held(i, s)`` are ``min(s, window_i)`` tokens, or what the target engine allocates for them.

Departure: sums over blocks are the paper's, and exact for weights. Where the target engine allocates KV memory for
groups of layers, unfilled groups are paid for as well, and once what a prompt being read holds beyond its windows
(``moesaic.costs.kv_allocator``).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from moesaic.core.config import CacheDtype
from moesaic.core.errors import ArtifactError
from moesaic.costs.kv_allocator import TargetEngine, held_tokens, paid_layers
from moesaic.costs.workload import Workload
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape

ELEMENT_BYTES: dict[CacheDtype, int] = {"bf16": 2, "fp8": 1}
MIB = 2**20
Source = Literal["in_process", "vllm", "modelled"]
"""Where times come from: blocks timed in process, the engine's own layers timed in it, or a hardware table.

Sizes always follow from shapes."""


@dataclass(frozen=True)
class Runtime:
    """Milliseconds for the prompts of all concurrent requests, and for one decode step of all of them."""

    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class WorkloadCost(Runtime):
    """The cost of a block under one workload."""

    kv_bytes: int
    """KV cache of one request at its full length."""
    prompt_kv_bytes: int = 0
    """What the one request whose prompt is being read holds beyond what it keeps."""


@dataclass(frozen=True)
class BlockCost:
    """The cost of a block: the size of its weights, and its cost under every workload by name."""

    parameters: int
    memory_bytes: int
    source: Source
    workloads: Mapping[str, WorkloadCost]


@dataclass(frozen=True)
class FixedCost:
    """The cost that every assembly of a parent shares: embedding, final norm, head and the overhead of a step."""

    parameters: int
    memory_bytes: int
    source: Source
    workloads: Mapping[str, Runtime]


@dataclass(frozen=True)
class AssemblyCost:
    """The cost of a whole model; memory, throughput and latency are given by workload name."""

    parameters: int
    num_experts: int
    memory_mib: Mapping[str, float]
    throughput_tokens_per_s: Mapping[str, float]
    latency_ms: Mapping[str, float]


@dataclass(frozen=True)
class CostTable:
    """The costs of every distinct block under every workload."""

    parent: Architecture
    hardware: Mapping[str, Any]
    kv_cache: CacheDtype
    engine: TargetEngine
    workloads: tuple[Workload, ...]
    fixed: FixedCost
    blocks: Mapping[Block, BlockCost]

    def evaluate(self, architecture: Architecture) -> AssemblyCost:
        """Add up an assembly."""
        costs = [self.blocks[block] for block in architecture.blocks]
        layers = paid_layers(self.engine, architecture.layouts)
        memory, throughput, latency = {}, {}, {}
        for workload in self.workloads:
            name, fixed = workload.name, self.fixed.workloads[workload.name]
            prefill_ms = fixed.prefill_ms + sum(cost.workloads[name].prefill_ms for cost in costs)
            decode_ms = fixed.decode_ms + sum(cost.workloads[name].decode_ms for cost in costs)
            cache_bytes = sum(self.cache_bytes(window, workload) * count for window, count in layers.items())
            weights = self.fixed.memory_bytes + sum(cost.memory_bytes for cost in costs)
            memory[name] = (weights + cache_bytes) / MIB
            throughput[name] = 1000 * output_tokens(workload) / (prefill_ms + workload.output_tokens * decode_ms)
            latency[name] = decode_ms
        parameters = self.fixed.parameters + sum(cost.parameters for cost in costs)
        return AssemblyCost(parameters, architecture.num_experts, memory, throughput, latency)

    def cache_bytes(self, window: int | None, workload: Workload) -> int:
        """Cache bytes of all requests of a workload in one layer with this window, one prompt being read."""
        row = next(cost.workloads[workload.name] for block, cost in self.blocks.items() if block.window == window)
        return workload.concurrency * row.kv_bytes + row.prompt_kv_bytes

    def to_json(self) -> str:
        """The content of ``costs.json``."""
        rows = [block.as_config() | asdict(cost) for block, cost in self.blocks.items()]
        content = {
            "parent": [block.as_config() for block in self.parent.blocks],
            "hardware": dict(self.hardware),
            "kv_cache": self.kv_cache,
            "engine": self.engine,
            "workloads": [workload.model_dump() for workload in self.workloads],
            "fixed": asdict(self.fixed),
            "rows": rows,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """Read what :meth:`to_json` wrote."""
        try:
            content = json.loads(text, parse_constant=_refuse)
            fixed = content["fixed"]
            runtimes = {name: Runtime(**runtime) for name, runtime in fixed["workloads"].items()}
            return cls(
                parent=Architecture.of(Block.from_config(entry) for entry in content["parent"]),
                hardware=content["hardware"],
                kv_cache=content["kv_cache"],
                engine=content["engine"],
                workloads=tuple(Workload.model_validate(workload) for workload in content["workloads"]),
                fixed=FixedCost(fixed["parameters"], fixed["memory_bytes"], fixed["source"], runtimes),
                blocks=dict(_read_row(row) for row in content["rows"]),
            )
        except (KeyError, TypeError, ValueError) as broken:
            raise ArtifactError(f"the cost table cannot be read ({broken!r}); run measure_costs again") from broken


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} cannot be summed")


def _read_row(row: Mapping[str, Any]) -> tuple[Block, BlockCost]:
    workloads = {name: WorkloadCost(**cost) for name, cost in row["workloads"].items()}
    cost = BlockCost(row["parameters"], row["memory_bytes"], row["source"], workloads)
    return Block.from_config(row), cost


def output_tokens(workload: Workload) -> int:
    """Tokens that all concurrent requests of a workload generate."""
    return workload.concurrency * workload.output_tokens


def full_length(workload: Workload) -> int:
    """Tokens of one request when it ends."""
    return workload.input_tokens + workload.output_tokens


def mean_context(workload: Workload) -> int:
    """Tokens a request holds halfway through its output, the context at which a decode step is costed."""
    return workload.input_tokens + workload.output_tokens // 2


def block_parameters(shape: ModelShape, block: Block) -> int:
    """Parameters of one layer."""
    return sum(spec.num_parameters for spec in layout.layer_specs(shape, 0, block).values())


def block_bytes(shape: ModelShape, block: Block, packed: bool = True) -> int:
    """Bytes of one layer's weights, experts in MXFP4 if ``packed``, the rest in BF16."""
    return sum(spec.num_bytes for spec in layout.layer_specs(shape, 0, block, packed).values())


def of_one_expert(measure: Callable[[ModelShape, Block], int], shape: ModelShape, block: Block) -> int:
    """Of one of a block's experts, its router row included, what :func:`block_parameters` or :func:`block_bytes` is.

    A block without experts gives 0.
    """
    if block.is_dense:
        return 0
    one, two = (replace(block, num_experts=count, experts_per_token=1) for count in (1, 2))
    return measure(shape, two) - measure(shape, one)


def outer_parameters(shape: ModelShape) -> int:
    """Parameters outside the layers."""
    return sum(spec.num_parameters for spec in layout.outer_specs(shape).values())


def outer_bytes(shape: ModelShape) -> int:
    """Bytes of the weights outside the layers."""
    return sum(spec.num_bytes for spec in layout.outer_specs(shape).values())


def expected_experts(num_experts: int, experts_per_token: int, num_tokens: float) -> float:
    """Distinct experts that ``num_tokens`` independent, evenly routed tokens touch: ``E (1 - (1 - k/E)^B)``."""
    if not num_experts:
        return 0.0
    return num_experts * (1 - math.pow(1 - experts_per_token / num_experts, num_tokens))


def layer_kv_bytes(
    shape: ModelShape,
    window: int | None,
    num_tokens: int,
    kv_cache: CacheDtype,
    engine: TargetEngine = "moesaic",
    step_tokens: int = 1,
) -> int:
    """KV cache of one request of ``num_tokens`` in one layer; ``moesaic`` allocates no more than is attended to."""
    return held_tokens(engine, window, num_tokens, step_tokens) * shape.kv_elements * ELEMENT_BYTES[kv_cache]


def request_kv_bytes(
    shape: ModelShape,
    architecture: Architecture,
    num_tokens: int,
    kv_cache: CacheDtype,
    engine: TargetEngine,
    step_tokens: int = 1,
) -> int:
    """KV cache of one request in all layers, as an engine allocates it for ``step_tokens`` of the request a step."""
    layers = paid_layers(engine, architecture.layouts)
    return sum(
        count * layer_kv_bytes(shape, window, num_tokens, kv_cache, engine, step_tokens)
        for window, count in layers.items()
    )

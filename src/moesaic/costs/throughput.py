"""How much a serving engine gets out of GPUs: the requests it can hold, and the tokens it then generates.

What is left of the GPUs' memory for the KV cache, ``g`` GPUs together::

    room    = g (memory - overhead) - weights - (expert_padding - 1) expert weights

``overhead`` is what an engine does not use for weights or cache: the share it leaves free, activations, CUDA graphs and
libraries. ``expert_padding`` is by how much expert weights grow when the engine lays them out for its kernels.

A request holds ``kv(s)`` bytes when it is ``s`` tokens long, unfilled groups of layers included
(``moesaic.costs.block_costs``). Requests are at independent points of their lives, ``s`` even between input and input +
output. Admitted is the largest whole number ``n`` whose cache fits with a margin of ``z`` standard deviations, so that
preemption is rare::

    n mean(kv) + z sqrt(n) std(kv) <= room,     n <= max_requests

Many short requests are thus admitted by their average, a few long ones nearly by their full length. Throughput is that
of ``n`` requests in steady state, see ``moesaic.costs.hardware``. Departure: no latency limit, and no request waits for
another's prompt; the figures are ceilings of one configuration.
"""

from dataclasses import dataclass
from statistics import fmean, pstdev

from moesaic.costs.block_costs import MIB, request_kv_bytes
from moesaic.costs.hardware import Target
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture
from moesaic.models.gpt_oss import num_bytes, tensor_specs

MARGIN = 2.0
"""``z``: standard deviations between mean use and room; a normal sum is beyond two of them 2 % of the time."""
_POINTS = 64


@dataclass(frozen=True)
class Serving:
    """What one model does under one workload."""

    requests: int
    """In flight; 0 if not even one fits."""
    room_bytes: float
    """For the cache, on all GPUs."""
    tokens_per_s: float
    """Generated, of all requests."""
    step_ms: float
    """One decode step."""
    prefill_share: float
    """Of the time, spent on prompts."""


def cache_room(target: Target, architecture: Architecture) -> float:
    """Bytes for the KV cache on all GPUs together; negative if the weights do not fit."""
    specs = tensor_specs(target.shape, architecture)
    experts = sum(spec.num_bytes for name, spec in specs.items() if name.endswith(("_blocks", "_scales")))
    padding = (target.table.expert_padding - 1) * experts
    usable = target.num_gpus * (target.table.memory_mib - target.table.overhead_mib) * MIB
    return usable - num_bytes(target.shape, architecture) - padding


def life_kv_bytes(
    target: Target, architecture: Architecture, workload: Workload, group_size: int | None
) -> tuple[float, float]:
    """Mean and standard deviation of a request's cache over its life."""
    steps = [workload.input_tokens + int((step + 0.5) * workload.output_tokens / _POINTS) for step in range(_POINTS)]
    sizes = [request_kv_bytes(target.shape, architecture, at, target.kv_cache, group_size) for at in steps]
    return fmean(sizes), pstdev(sizes)


def admitted(room_bytes: float, mean_bytes: float, std_bytes: float, max_requests: int) -> int:
    """The most requests that fit; the root of a quadratic in sqrt(n), rounded down."""
    if room_bytes <= 0:
        return 0
    spread = MARGIN * std_bytes
    root = (-spread + (spread**2 + 4 * mean_bytes * room_bytes) ** 0.5) / (2 * mean_bytes)
    return min(max_requests, int(root**2 + 1e-9))


def serve(
    target: Target,
    architecture: Architecture,
    workload: Workload,
    group_size: int | None = None,
    max_requests: int | None = None,
) -> Serving:
    """Serve as many requests as fit.

    Args:
        target: hardware, model sizes and cache type.
        architecture: the model's blocks.
        workload: lengths; its concurrency is not looked at.
        group_size: of the engine's KV allocator; None pays for no padding.
        max_requests: the engine's own limit; None takes the table's.
    """
    room = cache_room(target, architecture)
    mean, std = life_kv_bytes(target, architecture, workload, group_size)
    limit = target.table.max_requests if max_requests is None else max_requests
    requests = admitted(room, mean, std, limit)
    if requests == 0:
        return Serving(0, room, 0.0, 0.0, 0.0)
    runtime = target.model_runtime(architecture, workload.model_copy(update={"concurrency": requests}))
    busy_ms = runtime.prefill_ms + workload.output_tokens * runtime.decode_ms
    tokens_per_s = 1000 * requests * workload.output_tokens / busy_ms
    return Serving(requests, room, tokens_per_s, runtime.decode_ms, runtime.prefill_ms / busy_ms)

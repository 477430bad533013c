"""Throughput of a serving engine on GPUs: how many requests fit, and how many tokens per second they generate.

The formulas are ours; the paper measures throughput. The memory that is left for the KV cache on ``g`` GPUs is::

    room    = g (memory - overhead) - weights - (expert_padding - 1) expert weights

``overhead`` is what an engine does not use for weights or cache: the share it leaves free, activations, CUDA graphs and
libraries. ``expert_padding`` is by how much expert weights grow when the engine lays them out for its kernels.

A request holds ``kv(s)`` bytes when it is ``s`` tokens long, unfilled groups of layers included, see
``moesaic.costs.kv_allocator``. Requests are at independent points of their lives, ``s`` even between input and input +
output. Admitted is the largest whole number ``n`` whose cache fits with a margin of ``z`` standard deviations, so that
preemption is rare, and with what the one whose prompt is read holds beyond its windows::

    n mean(kv) + z sqrt(n) std(kv) + prompt <= room,     n <= max_requests

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
from moesaic.models.layout import num_bytes, tensor_specs

MARGIN = 2.0
"""``z``: standard deviations between mean use and room; a normal sum is beyond two of them 2 % of the time."""
_POINTS = 64


@dataclass(frozen=True)
class Throughput:
    """The throughput of one model under one workload, and what it follows from."""

    requests: int
    """Requests in flight; 0 if not even one fits."""
    room_bytes: float
    """Bytes for the KV cache on all GPUs."""
    tokens_per_s: float
    """Generated tokens of all requests together."""
    step_ms: float
    """Time of one decode step."""
    prefill_share: float
    """Share of the time that is spent on prompts."""


def cache_room(target: Target, architecture: Architecture) -> float:
    """Bytes for the KV cache on all GPUs together; negative if the weights do not fit."""
    specs = tensor_specs(target.shape, architecture)
    experts = sum(spec.num_bytes for name, spec in specs.items() if name.endswith(("_blocks", "_scales")))
    padding = (target.table.expert_padding - 1) * experts
    usable = target.num_gpus * (target.table.memory_mib - target.table.overhead_mib) * MIB
    return usable - num_bytes(target.shape, architecture) - padding


def kv_bytes_mean_and_std(target: Target, architecture: Architecture, workload: Workload) -> tuple[float, float]:
    """Mean and standard deviation of a request's KV cache between its first and its last output token."""
    lengths = [workload.input_tokens + int((step + 0.5) * workload.output_tokens / _POINTS) for step in range(_POINTS)]
    kv_bytes = [request_kv_bytes(target.shape, architecture, at, target.kv_cache, target.engine) for at in lengths]
    return fmean(kv_bytes), pstdev(kv_bytes)


def _prompt_kv_bytes(target: Target, architecture: Architecture, workload: Workload) -> int:
    """What a request holds beyond its windows while its prompt is read."""
    reading, read = (
        request_kv_bytes(target.shape, architecture, workload.input_tokens, target.kv_cache, target.engine, tokens)
        for tokens in (target.table.chunk_tokens, 1)
    )
    return reading - read


def admitted(room_bytes: float, mean_bytes: float, std_bytes: float, max_requests: int) -> int:
    """The most requests that fit; the root of a quadratic in sqrt(n), rounded down."""
    if room_bytes <= 0:
        return 0
    spread = MARGIN * std_bytes
    root = (-spread + (spread**2 + 4 * mean_bytes * room_bytes) ** 0.5) / (2 * mean_bytes)
    return min(max_requests, int(root**2 + 1e-9))


def estimate_throughput(
    target: Target,
    architecture: Architecture,
    workload: Workload,
    max_requests: int | None = None,
) -> Throughput:
    """Throughput with as many requests in flight as fit.

    Args:
        target: hardware, model sizes, cache type and engine.
        architecture: the model's blocks.
        workload: gives the lengths; its concurrency is not used.
        max_requests: the engine's own limit; None takes the table's.
    """
    room = cache_room(target, architecture)
    mean, std = kv_bytes_mean_and_std(target, architecture, workload)
    limit = target.table.max_requests if max_requests is None else max_requests
    requests = admitted(room - _prompt_kv_bytes(target, architecture, workload), mean, std, limit)
    if requests == 0:
        return Throughput(0, room, 0.0, 0.0, 0.0)
    runtime = target.model_runtime(architecture, workload.model_copy(update={"concurrency": requests}))
    busy_ms = runtime.prefill_ms + workload.output_tokens * runtime.decode_ms
    tokens_per_s = 1000 * requests * workload.output_tokens / busy_ms
    return Throughput(requests, room, tokens_per_s, runtime.decode_ms, runtime.prefill_ms / busy_ms)

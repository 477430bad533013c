"""Memory of what generates: a model that is held whole by one process, or a serving engine on one or more GPUs.

In process, and under ``moesaic``, weights are unpacked and every request in flight may grow to its full length::

    device = parameters * w + in_flight * kv(longest)

An engine keeps a share of the packed weights on each of ``g`` GPUs. It takes in as many requests as its scheduler may
run, and its cache holds; one of full length must fit, or it does not start. vLLM counts each with the tokens of a whole
step (``moesaic.costs.throughput``, ``moesaic.costs.kv_allocator``)::

    device = (weights + expert padding) / g + min(limit, in_flight, room / kv(longest)) * kv(longest) / g
    room   = g (memory - overhead) - weights - expert padding
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moesaic.core.config import CacheDtype
from moesaic.core.errors import InfeasibleError
from moesaic.costs.block_costs import MIB, request_kv_bytes
from moesaic.costs.facts import WIDTH, Facts, resident
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.costs.throughput import cache_room
from moesaic.models.architecture import Architecture


@dataclass(frozen=True)
class Requests:
    """What is to be generated at once."""

    in_flight: int
    longest: int
    """Tokens of one at its end, its prompt included."""
    engine: str
    """``in_process``, ``moesaic``, or an engine of its own."""
    precision: str
    """What weights are unpacked to, in process."""
    kv_cache: CacheDtype
    num_gpus: int
    """GPUs that an engine shares a model out to."""


@dataclass(frozen=True)
class Generation:
    """Memory of one process, or one GPU of an engine."""

    device: Mapping[str, float]
    """Bytes by what they are."""
    host_bytes: float
    requests: int
    """Requests of full length in flight."""

    @property
    def device_bytes(self) -> float:
        """All that a device holds."""
        return sum(self.device.values())


def generation(stage: str, facts: Facts, model: Architecture, asked: Requests) -> Generation:
    """Memory of generation.

    Raises:
        InfeasibleError: if the engine has no room for one request of full length, with what would fit.
    """
    if asked.engine in ("in_process", "moesaic") or facts.target is None:
        values = request_kv_bytes(facts.shape, model, asked.longest, "fp8", "moesaic")  # one byte each
        weights = resident(facts, model, asked.precision)
        cache = asked.in_flight * values * WIDTH[asked.precision]
        return Generation({"weights, unpacked": weights, _cache(asked.in_flight): cache}, weights, asked.in_flight)
    target = replace(facts.target, num_gpus=asked.num_gpus)
    allocator: TargetEngine = "vllm" if asked.engine == "vllm" else target.engine
    each = request_kv_bytes(facts.shape, model, asked.longest, asked.kv_cache, allocator, target.table.chunk_tokens)
    room, usable = cache_room(target, model), target.table.memory_mib - target.table.overhead_mib
    requests = min(asked.in_flight, target.table.max_requests, int(max(0.0, room) / each))
    if not requests:
        more = (gpus for gpus in (2, 4, 8) if cache_room(replace(target, num_gpus=gpus), model) >= each)
        advice = (
            f"{gpus} GPUs, or shorter replies" if (gpus := next(more, None)) else "a smaller model or shorter replies"
        )
        raise InfeasibleError(
            f"{stage} has {room / 2**30:.1f} GiB of {asked.num_gpus} GPU(s) for KV cache, a request of {asked.longest} "
            f"tokens takes {each / 2**30:.1f}; what fits: {advice}"
        )
    held = asked.num_gpus * usable * MIB - room
    shares = {"weights": held / asked.num_gpus, _cache(requests): requests * each / asked.num_gpus}
    return Generation(shares, 0.0, requests)


def _cache(requests: int) -> str:
    return f"KV cache of {requests} requests of full length"

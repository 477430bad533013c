"""What ``benchmark_serving`` writes, made by its own code from numbers a reader can check by hand."""

from typing import Any

from moesaic.measure.benchmark_serving.load_sweep import Counts, Latency, LoadPoint, LoadRun
from moesaic.measure.benchmark_serving.run import describe

SPEEDS = {
    "parent": {("long", 2): (900, 1000, 1100), ("long", 8): (2000, 2000, 2000), ("short", 2): (400, 400, 400)},
    "child": {("long", 2): (990, 1200, 1320), ("long", 8): (3200, 3000, 3100), ("short", 2): (500, 400, 300)},
}
"""Tokens per second of three repeats, by workload and users."""
SIZES = {"long": (100, 50), "short": (10, 50)}


def load_run(point: LoadPoint, tokens_per_s: float) -> LoadRun:
    """A run in which all users share the throughput and no time goes to anything but tokens."""
    between_ms = 1000 * point.concurrency / tokens_per_s
    lengths = point.input_tokens, point.output_tokens
    return LoadRun(
        counts=Counts(4 * point.concurrency, *(4 * point.concurrency * length for length in lengths)),
        warmup=Counts(0, 0, 0),
        errors=0,
        requests_per_s=tokens_per_s / point.output_tokens,
        tokens_per_s=tokens_per_s,
        mean_output_tokens=point.output_tokens,
        ttft_ms=Latency(between_ms, between_ms, 2 * between_ms),
        itl_ms=Latency(between_ms, between_ms, 2 * between_ms),
        request_ms=Latency(*(factor * between_ms * point.output_tokens for factor in (1, 1, 2))),
    )


def serving(child_kv_cache: str = "bf16") -> dict[str, Any]:
    """A ``measurements.json``."""
    points = {key: LoadPoint(key[0], *SIZES[key[0]], key[1]) for key in SPEEDS["parent"]}
    sweeps = {
        model: {points[key]: [load_run(points[key], speed) for speed in speeds] for key, speeds in found.items()}
        for model, found in SPEEDS.items()
    }
    about = {"engine": "moesaic", "client": {"name": "aiperf", "version": "0"}, "repeats": 3}
    kv_cache = {"parent": "bf16", "child": child_kv_cache}
    return about | {"kv_cache": kv_cache, "counted_by_server": ["requests"]} | describe(sweeps)

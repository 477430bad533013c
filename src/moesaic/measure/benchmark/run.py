"""Speed of parent and child on this device: prompts read, tokens generated, side by side.

Every point times both models on the same random prompts of exact length with a fixed number of output tokens and no
stop token. Repeats alternate between the models (parent, child, parent, child, ...), so that a machine that slows down
slows both; an untimed run of each comes first. Medians are reported with the smallest and the largest value.

With ``by_block`` no model is held whole: every distinct block of both is timed, their repeats in turns (see
``moesaic.search.measure_costs.block_timing``), and a model's time is the sum over its layers and the part outside them.
"""

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.core.errors import ConfigError
from moesaic.core.progress import track
from moesaic.costs.block_costs import Runtime
from moesaic.costs.workload import Workload
from moesaic.measure.benchmark.stage import BenchmarkConfig
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import Decoding
from moesaic.models.loading import choose_device
from moesaic.models.whole_model import load_model
from moesaic.search.measure_costs.block_timing import time_blocks


@dataclass(frozen=True)
class Point:
    """What is timed: so many requests at once, each of so many prompt and output tokens."""

    batch_size: int
    input_tokens: int
    output_tokens: int

    def workload(self, name: str) -> Workload:
        """The same as blocks are timed under."""
        return Workload(
            name=name, input_tokens=self.input_tokens, output_tokens=self.output_tokens, concurrency=self.batch_size
        )


@dataclass(frozen=True)
class Timing:
    """One run of a point: all prompts together, then one decode step of all requests on average."""

    prefill_ms: float
    decode_ms: float
    total_ms: float


def run(config: BenchmarkConfig, *, parent: Path, child: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``measurements.json``."""
    points = list_points(config)
    for model in (parent, child):
        check_positions(Checkpoint.open(model), points)
    device = choose_device()
    paths = {"parent": parent, "child": child}
    steps = _time_by_block(config, paths, points, device) if config.by_block else _time(config, paths, points, device)
    measured = [describe(name, point, repeats) for point, timings in steps for name, repeats in timings.items()]
    hardware = _hardware(device) | {"by_block": config.by_block}
    content = {"hardware": hardware, "precision": config.precision, "points": measured}
    (output / "measurements.json").write_text(json.dumps(content, indent=1) + "\n")
    return _metrics(measured)


def list_points(config: BenchmarkConfig) -> list[Point]:
    """The sweep, then the workloads that are not part of it, each point once."""
    new = config.output_tokens
    sweep = [Point(batch, tokens, new) for tokens in config.input_tokens for batch in config.batch_sizes]
    workloads = [Point(load.concurrency, load.input_tokens, load.output_tokens) for load in config.workloads]
    return list(dict.fromkeys(sweep + workloads))


def check_positions(checkpoint: Checkpoint, points: Sequence[Point]) -> None:
    """Raise ConfigError if a point is longer than a model's positions."""
    longest = max(points, key=lambda point: point.input_tokens + point.output_tokens)
    if longest.input_tokens + longest.output_tokens > checkpoint.shape.max_positions:
        raise ConfigError(
            f"{longest.input_tokens} input and {longest.output_tokens} output tokens do not fit the "
            f"{checkpoint.shape.max_positions} positions of {checkpoint.directory}; shorten them"
        )


def _time(
    config: BenchmarkConfig, paths: Mapping[str, Path], points: Sequence[Point], device: torch.device
) -> Iterator[tuple[Point, dict[str, list[Timing]]]]:
    precision = getattr(torch, config.precision)
    models = {name: load_model(path, precision).to(device) for name, path in paths.items()}
    yield from track(_schedule(models, points, config.repeats), len(points), "benchmark")


def _time_by_block(
    config: BenchmarkConfig, paths: Mapping[str, Path], points: Sequence[Point], device: torch.device
) -> Iterator[tuple[Point, dict[str, list[Timing]]]]:
    """Blocks carry weights of the parent: which experts a layer of the child has kept does not change its time."""
    architectures = {name: Checkpoint.open(path).architecture for name, path in paths.items()}
    distinct = sorted({block for model in architectures.values() for block in model.blocks}, key=lambda b: b.label)
    loads = {point: point.workload(f"point{index}") for index, point in enumerate(points)}
    precision = getattr(torch, config.precision)
    parent = Checkpoint.open(paths["parent"])
    times, fixed = time_blocks(parent, distinct, list(loads.values()), config.repeats, precision, device)
    for point, load in loads.items():
        yield point, {name: [_sum(model, times, fixed, load)] for name, model in architectures.items()}


def _sum(
    model: Architecture, times: Mapping[Block, Mapping[str, Runtime]], fixed: Mapping[str, Runtime], load: Workload
) -> Timing:
    """``total = prefill + (output_tokens - 1) decode``: the first token comes out of the prefill."""
    parts = [fixed[load.name], *(times[block][load.name] for block in model.blocks)]
    prefill_ms, decode_ms = sum(part.prefill_ms for part in parts), sum(part.decode_ms for part in parts)
    return Timing(prefill_ms, decode_ms, prefill_ms + (load.output_tokens - 1) * decode_ms)


def _schedule(
    models: Mapping[str, PreTrainedModel], points: Sequence[Point], repeats: int
) -> Iterator[tuple[Point, dict[str, list[Timing]]]]:
    for point in points:
        timings: dict[str, list[Timing]] = {name: [] for name in models}
        for repeat in range(repeats + 1):
            for name, model in models.items():
                timing = time_generation(model, point, seed=repeat)
                if repeat:
                    timings[name].append(timing)
        yield point, timings


@torch.inference_mode()
def time_generation(model: PreTrainedModel, point: Point, seed: int) -> Timing:
    """Generate ``point.output_tokens`` tokens for random prompts and time both phases.

    The first token comes out of the prefill, so there is one decode step fewer than there are output tokens; with a
    single output token ``decode_ms`` is 0.
    """
    draws = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(vocabulary, (point.batch_size, point.input_tokens), generator=draws).tolist()
    start = _now_ms(model.device)
    decoding = Decoding(model, prompts)
    tokens = decoding.logits.argmax(-1)
    prefilled = _now_ms(model.device)
    for _ in range(point.output_tokens - 1):
        decoding.step(tokens)
        tokens = decoding.logits.argmax(-1)
    end = _now_ms(model.device)
    return Timing(prefilled - start, (end - prefilled) / max(1, point.output_tokens - 1), end - start)


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def describe(model: str, point: Point, timings: Sequence[Timing]) -> dict[str, Any]:
    """One entry of ``points``; throughput counts output tokens over the whole time, prefill included."""
    tokens = point.batch_size * point.output_tokens
    return {
        "model": model,
        "batch_size": point.batch_size,
        "input_tokens": point.input_tokens,
        "output_tokens": point.output_tokens,
        "tokens_per_s": _spread([1000 * tokens / timing.total_ms for timing in timings]),
        "prefill_ms": _spread([timing.prefill_ms for timing in timings]),
        "decode_ms": _spread([timing.decode_ms for timing in timings]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _metrics(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for parent, child in zip(measured[::2], measured[1::2], strict=True):
        suffix = f"in{parent['input_tokens']}_out{parent['output_tokens']}_batch{parent['batch_size']}"
        old, new = parent["tokens_per_s"]["median"], child["tokens_per_s"]["median"]
        metrics |= {
            f"parent_tokens_per_s_{suffix}": old,
            f"child_tokens_per_s_{suffix}": new,
            f"speedup_{suffix}": new / old,
        }
    return metrics


def _hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "num_threads": torch.get_num_threads(), "torch": torch.__version__}

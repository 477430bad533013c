"""Speed of parent and child on this device: prompts read, tokens generated, side by side.

Every point times both models on the same random prompts of exact length with a fixed number of output tokens and no
stop token. Repeats alternate between the models (parent, child, parent, child, ...), so that a machine that slows down
slows both; an untimed run of each comes first. Medians are reported with the smallest and the largest value.
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

from moesaic.blocks import choose_device
from moesaic.checkpoint import Checkpoint
from moesaic.configs import BenchmarkConfig
from moesaic.errors import ConfigError
from moesaic.generation import Decoding
from moesaic.gpt_oss_puzzle import load_model
from moesaic.progress import track


@dataclass(frozen=True)
class Point:
    """What is timed: so many requests at once, each of so many prompt and output tokens."""

    batch_size: int
    input_tokens: int
    output_tokens: int


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
        _check_positions(Checkpoint.open(model), points, model)
    precision, device = getattr(torch, config.precision), choose_device()
    models = {name: load_model(path, precision).to(device) for name, path in (("parent", parent), ("child", child))}
    measured = []
    steps = _schedule(models, points, config.repeats)
    for point, timings in track(steps, len(points), "benchmark"):
        measured += [describe(name, point, found) for name, found in timings.items()]
    content = {"hardware": _hardware(device), "precision": config.precision, "points": measured}
    (output / "measurements.json").write_text(json.dumps(content, indent=1) + "\n")
    return _metrics(measured)


def list_points(config: BenchmarkConfig) -> list[Point]:
    """The sweep, then the workloads that are not part of it, each point once."""
    new = config.output_tokens
    sweep = [Point(batch, tokens, new) for tokens in config.input_tokens for batch in config.batch_sizes]
    workloads = [Point(load.concurrency, load.input_tokens, load.output_tokens) for load in config.workloads]
    return list(dict.fromkeys(sweep + workloads))


def _check_positions(checkpoint: Checkpoint, points: Sequence[Point], path: Path) -> None:
    longest = max(points, key=lambda point: point.input_tokens + point.output_tokens)
    if longest.input_tokens + longest.output_tokens > checkpoint.shape.max_positions:
        raise ConfigError(
            f"{longest.input_tokens} input and {longest.output_tokens} output tokens do not fit the "
            f"{checkpoint.shape.max_positions} positions of {path}; shorten them"
        )


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
        place = f"in{parent['input_tokens']}_out{parent['output_tokens']}_batch{parent['batch_size']}"
        old, new = parent["tokens_per_s"]["median"], child["tokens_per_s"]["median"]
        metrics |= {
            f"parent_tokens_per_s_{place}": old,
            f"child_tokens_per_s_{place}": new,
            f"speedup_{place}": new / old,
        }
    return metrics


def _hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "num_threads": torch.get_num_threads(), "torch": torch.__version__}

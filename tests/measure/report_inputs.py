"""The stages' outputs a report is made of, for a model of two layers, in numbers a reader can check by hand."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from moesaic.measure.report.evidence import Evidence
from moesaic.measure.report.page import render_page

PARENT = [(4, 8), (4, None)]
CHILD = [(2, 8), (4, 8)]
COSTS = {(4, 8): (40, 4.0, 2.0, 2**18), (2, 8): (20, 3.0, 2.0, 2**18), (4, None): (40, 5.0, 3.0, 2**20)}
"""Block: parameters, prefill and decode milliseconds, cache bytes of a request."""


def block(entry: tuple[int, int | None]) -> dict[str, int | None]:
    """A token uses half of the experts, each of which is the wider the more there are."""
    return {
        "num_local_experts": entry[0],
        "num_experts_per_tok": entry[0] // 2,
        "intermediate_size": 16 * entry[0],
        "sliding_window": entry[1],
    }


def solution(
    blocks: list[tuple[int, int | None]], damage: float, speed: float, measured: float | None = None
) -> dict[str, Any]:
    return {
        "measured": measured,
        "breaks": [],
        "blocks": [block(entry) for entry in blocks],
        "damage": damage,
        "parameters": 100 + sum(COSTS[entry][0] for entry in blocks),
        "num_experts": sum(entry[0] for entry in blocks),
        "memory_mib": {"long": 2.0 * len(blocks)},
        "throughput_tokens_per_s": {"long": speed},
        "status": "optimal",
    }


def evaluation(name: str, low: float, high: float, tokens_low: float = 10, tokens_high: float = 100) -> dict[str, Any]:
    """Two tasks of 20 problems, half a tenth below and above the mean where there is room; the first are solved."""

    def effort(mean: float, tokens: float) -> dict[str, Any]:
        def result(accuracy: float) -> dict[str, float]:
            return {"accuracy": accuracy, "tokens_per_request": tokens, "truncated": 0.0}

        apart = min(0.05, mean, 1 - mean)
        tasks = {"add": mean + apart, "hops": mean - apart}
        return result(mean) | {
            "tasks": {task: result(share) | {"solved": solved(share)} for task, share in tasks.items()}
        }

    def solved(share: float) -> dict[str, float]:
        return {f"{number:02d}": min(max(20 * share - number, 0.0), 1.0) for number in range(20)}

    return {
        "name": name,
        "parameters": 180 if name == "parent" else 160,
        "problems": {"split": "test", "count": 40, "digest": "0f"},
        "efforts": {"low": effort(low, tokens_low), "high": effort(high, tokens_high)},
    }


def point(model: str, setting: tuple[int, int, int], speed: float) -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": 0.9 * value, "max": 1.1 * value}

    named = dict(zip(("input_tokens", "output_tokens", "batch_size"), setting, strict=True))
    times = {"prefill_ms": spread(1000 / speed), "decode_ms": spread(500 / speed)}
    return {"model": model, **named, "tokens_per_s": spread(speed), **times}


def costs() -> str:
    rows = [
        {
            **block(entry),
            "parameters": parameters,
            "memory_bytes": 2**20,
            "source": "modelled",
            "workloads": {"long": {"prefill_ms": prefill, "decode_ms": decode, "kv_bytes": kv}},
        }
        for entry, (parameters, prefill, decode, kv) in COSTS.items()
    ]
    content = {
        "parent": [block(entry) for entry in PARENT],
        "hardware": {"device": "none"},
        "kv_cache": "bf16",
        "engine": "moesaic",
        "workloads": [{"name": "long", "input_tokens": 100, "output_tokens": 50, "concurrency": 2}],
        "fixed": {
            "parameters": 100,
            "memory_bytes": 2**20,
            "source": "modelled",
            "workloads": {"long": {"prefill_ms": 1.0, "decode_ms": 1.0}},
        },
        "rows": rows,
    }
    return json.dumps(content)


def scores() -> dict[str, Any]:
    rows = [
        {"layer": layer, **block((experts, window)), "damage": damage}
        | {"short": {"hidden_mse": damage / 2}, "long": {"hidden_mse": damage / 2}}
        for layer, experts, window, damage in ((0, 4, 8, 0.0), (0, 2, 8, 0.15), (1, 4, None, 0.0), (1, 4, 8, 0.05))
    ]
    return {"metric": "hidden_mse", "rows": rows}


def inputs() -> dict[str, Any]:
    """Everything ``read_evidence`` takes."""
    speeds = {(10, 50, 2): (400, 400), (100, 50, 2): (1000, 1200), (100, 50, 8): (2000, 3000)}
    architecture = {
        "parent": solution(PARENT, 0.0, 500.0),
        "candidates": {
            "puzzle": solution(CHILD, 0.2, 600.0, measured=0.22),
            "greedy": solution([(2, 8), (4, None)], 0.3, 600.0, measured=0.33),
            "random-0": solution([(4, 8), (4, 8)], 0.4, 600.0),
            "random-1": solution(CHILD, 0.6, 600.0),
        },
        "skipped": {"uniform": "no single expert count keeps the limits"},
        "swept": "throughput of long",
        "frontier": [solution(PARENT, 0.0, 500.0), solution(CHILD, 0.2, 600.0)],
        "limits": {},
        "refinement": {
            "metric": "hidden_mse",
            "evaluations": [
                {"blocks": [], "sum": 0.18, "expected": 0.18, "measured": 0.24},
                {"blocks": [], "sum": 0.3, "expected": 0.37, "measured": 0.33},
                {"blocks": [], "sum": 0.2, "expected": 0.25, "measured": 0.22},
            ],
        },
    }
    return {
        "ranking": {"criterion": "reap", "layers": [{"order": [3, 1, 0, 2]}, {"order": [0, 1, 2, 3]}]},
        "scores": scores(),
        "costs": costs(),
        "architecture": architecture,
        "evaluation_parent": evaluation("parent", 0.5, 0.9),
        "evaluation_child": evaluation("puzzle", 0.45, 0.81, tokens_high=80),
        "baselines": [
            evaluation("greedy", 0.4, 0.8),
            evaluation("random-0", 0.2, 0.4),
            evaluation("random-1", 0.4, 0.6),
        ],
        "measurements": {
            "hardware": {"device": "cpu", "name": "a <fast> machine", "num_threads": 1, "by_block": False},
            "points": [
                point(model, setting, speed)
                for setting, pair in speeds.items()
                for model, speed in zip(("parent", "child"), pair, strict=True)
            ],
        },
    }


SEARCH_PICTURES = ("architecture", "importance", "damage", "search", "refinement", "throughput", "predictions")
PICTURES = (
    *("frontier", "efforts", *SEARCH_PICTURES, "contributions", "retention", "tokens", "distillation"),
    *("served_frontier", "served_throughput", "served_latency"),
)


def page_text(evidence: Evidence, summary: Mapping[str, Any]) -> str:
    """What a reader reads of the page, on one line, its pictures left empty."""
    page = render_page("A title", evidence, summary, dict.fromkeys(PICTURES, b""))
    return " ".join(html.unescape(re.sub("<[^>]*>", "", page)).split())

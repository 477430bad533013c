"""A recovery of the child in ``report_inputs`` and of its baseline, in numbers a reader can check by hand."""

from collections.abc import Mapping
from typing import Any

from tests.measure.report_inputs import evaluation, point

CURVE = [
    {"step": 0, "held_out_loss": 1.5, "held_out_kl": 0.9, "held_out_lm": 0.0},
    {"step": 1, "loss": 1.25, "kl": 0.75, "lm": 0.0, "learning_rate": 0.1},
    {"step": 2, "loss": 0.5, "kl": 0.25, "lm": 0.0, "learning_rate": 0.2},
    {"step": 2, "held_out_loss": 0.75, "held_out_kl": 0.4, "held_out_lm": 0.0},
]
TRACES = {"accuracy": 0.9, "tokens_per_request": 100.0, "truncated": 0.0, "traces": 12}
ACCURACIES = {
    "pruned": (0.40, 0.80),
    "distilled": (0.46, 0.88),
    "policy high": (0.45, 0.91),
    "policy mixed": (0.50, 0.85),
    "averaged": (0.51, 0.90),
    "fp8_unit": (0.41, 0.86),
    "fp8": (0.50, 0.90),
}
BASELINE = {stage: (low - 0.05, high - 0.1) for stage, (low, high) in ACCURACIES.items()}
KV_CACHES = {"fp8_unit": "fp8_unit", "fp8": "fp8"}


def evaluated(name: str, stage: str, accuracies: tuple[float, float]) -> dict[str, Any]:
    """The averaged child writes 9 tokens at low effort and 75 at high, the parent 10 and 100."""
    shortened = stage in ("averaged", "fp8_unit", "fp8")
    tokens = (9, 75) if shortened else (10, 100)
    return evaluation(name, *accuracies, *tokens) | {"kv_cache": KV_CACHES.get(stage, "bf16")}


def recovery(name: str = "puzzle", accuracies: Mapping[str, tuple[float, float]] = ACCURACIES) -> dict[str, Any]:
    """The content of a ``recovery.json``."""
    return {
        "candidate": name,
        "stages": [
            {"stage": stage, "evaluation": evaluated(name, stage, found)} for stage, found in accuracies.items()
        ],
        "traces": {"efforts": {"low": TRACES, "high": TRACES}},
        "curve": CURVE,
    }


def recovery_inputs() -> dict[str, Any]:
    """Everything ``read_recovery`` takes. The baseline was timed on a slower day: 1600 against 2000 tokens/s."""
    speeds = {"parent": 1000.0, "child": 1600.0}
    return {
        "recovery": recovery(),
        "recovery_baseline": recovery("greedy", BASELINE),
        "evaluation_parent_fp8": evaluation("parent", 0.5, 0.88) | {"kv_cache": "fp8"},
        "measurements_baseline": {"points": [point(model, (100, 50, 8), speed) for model, speed in speeds.items()]},
    }

"""What the numbers of recovery mean, in plain words; every number in them is the summary's."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moesaic.report.recovery import AVERAGED, DISTILLED, FP8, FP8_UNIT, PRUNED

_TIE = 0.0005
"""Accuracies that read the same when shown to a tenth of a point."""
_KV_NAMES = {"bf16": "BF16", FP8_UNIT: "FP8 with unit scales", FP8: "FP8 with calibrated scales"}


def recovery_headline(summary: Mapping[str, Any]) -> str:
    """What the recovered child is and does, in one paragraph."""
    recovery = summary["recovery"]
    efficiency = recovery["request_efficiency"]
    parts = [f"{recovery['parameters']['ratio']:.0%} of the parameters"]
    if recovery["searched_parent"]:
        windows = summary["windowed_layers"]
        left = windows["full_in_parent"] - windows["windowed_in_child"]
        parts.append(f"{summary['experts']['ratio']:.0%} of the experts")
        parts.append(f"{left} of {windows['full_in_parent']} full-attention layers (the others became windows)")
    return (
        f"The recovered child keeps {_listed(parts)}. Of the parent's accuracy it keeps "
        f"{_per_effort(recovery['retention'], _share)} effort. In requests answered per second it is at best "
        f"{efficiency['best']:.2f}x the parent, at {efficiency['best_effort']} effort."
    )


def recovery_findings(recovery: Mapping[str, Any]) -> list[str]:
    """One sentence or two for every question that recovery answers."""
    sentences = [_losses(recovery), _distilled(recovery), _policies(recovery), _tokens(recovery)]
    sentences += [_equal_accuracy(recovery), _cache(recovery)]
    if recovery["baseline"]:
        sentences.append(_baseline(recovery))
    return sentences


def kv_name(kv_cache: str) -> str:
    """A KV cache in words."""
    return _KV_NAMES[kv_cache]


def _losses(recovery: Mapping[str, Any]) -> str:
    changes = {effort: _change(recovery, PRUNED, effort) for effort in recovery["retention"]}
    return f"Pruning alone changed accuracy by {_per_effort(changes, _points)}."


def _distilled(recovery: Mapping[str, Any]) -> str:
    shares = {effort: share for effort, share in recovery["recovered_by_distillation"].items() if share is not None}
    if not shares:
        return "Pruning lost no accuracy, so distillation had none to bring back."
    more = ""
    if unlost := [effort for effort in recovery["retention"] if effort not in shares]:
        more = f" (pruning lost none at {_listed(unlost)} effort)"
    return f"Of the accuracy that pruning lost, distillation brought back {_per_effort(shares, _share)}{more}."


def _policies(recovery: Mapping[str, Any]) -> str:
    gains = {
        stage: {
            effort: found["accuracy"] - recovery["stages"][DISTILLED]["efforts"][effort]["accuracy"]
            for effort, found in entry["efforts"].items()
        }
        for stage, entry in recovery["stages"].items()
        if stage.startswith("policy") or stage == AVERAGED
    }
    parts = [
        f"{'their average' if stage == AVERAGED else stage} {_per_effort(changes, _points)}"
        for stage, changes in gains.items()
    ]
    return f"Against the distilled child, reinforcement learning changed accuracy so: {'; '.join(parts)}."


def _tokens(recovery: Mapping[str, Any]) -> str:
    before = {effort: found["tokens_ratio"] for effort, found in recovery["stages"][PRUNED]["efforts"].items()}
    return (
        f"Tokens per request at equal effort, recovered child over parent: "
        f"{_per_effort(recovery['tokens_ratio'], _ratio)}; before recovery {_per_effort(before, _ratio)}."
    )


def _equal_accuracy(recovery: Mapping[str, Any]) -> str:
    efficiency = recovery["request_efficiency"]
    parts = [
        f"{gain:.2f}x as many requests as the parent at {effort} effort"
        for effort, gain in efficiency["equal_accuracy"].items()
        if gain is not None
    ]
    missed = [effort for effort, gain in efficiency["equal_accuracy"].items() if gain is None]
    ratios = _per_effort(efficiency["equal_effort"], _ratio)
    sentences = [f"Requests per second at equal effort, recovered child over parent: {ratios}."]
    if parts:
        sentences.append(
            f"With no less accuracy, at whichever effort and KV cache, the child answers {_listed(parts)}."
        )
    if missed:
        sentences.append(f"At no effort is it as accurate as the parent at {_listed(missed)} effort.")
    return " ".join(sentences)


def _cache(recovery: Mapping[str, Any]) -> str:
    rows = {row["kv_cache"]: row["efforts"] for row in recovery["kv_cache"] if row["model"] == "child"}
    changes = {kv: {effort: found["change"] for effort, found in rows[kv].items()} for kv in (FP8_UNIT, FP8)}
    unit, calibrated = (_per_effort(changes[kv], _points) for kv in (FP8_UNIT, FP8))
    return (
        f"Storing the child's KV cache in FP8 instead of BF16 changes accuracy by {unit} with unit scales, and by "
        f"{calibrated} with calibrated ones."
    )


def _baseline(recovery: Mapping[str, Any]) -> str:
    """Whoever wins, and whether the difference is more than chance."""
    baseline, child = recovery["baseline"], recovery["candidate"]
    found = baseline["differences"][AVERAGED]
    error = f"{100 * found['standard_error']:.1f}"
    mean = f"{100 * abs(found['mean']):.1f} points in the mean over efforts ({_per_effort(found['efforts'], _points)})"
    if abs(found["mean"]) < _TIE:
        verdict = f"{child} and {baseline['name']} are equal in the mean over efforts"
    elif found["mean"] > 0:
        verdict = f"{child} beats {baseline['name']} by {mean}"
    else:
        verdict = f"the baseline {baseline['name']} beats {child} by {mean}"
    before = f"before recovery the difference was {_points(baseline['differences'][PRUNED]['mean'])}"
    settled = (
        f"more than twice the standard error of {error}, which counts the choice of problems only"
        if found["settled"]
        else f"less than twice the standard error of {error}, so these problems do not settle it"
    )
    return f"After identical recovery {verdict}; {before}. That is {settled}."


def _change(recovery: Mapping[str, Any], stage: str, effort: str) -> float:
    accuracy: float = recovery["stages"][stage]["efforts"][effort]["accuracy"]
    return accuracy - float(recovery["parent"]["efforts"][effort]["accuracy"])


def _per_effort(values: Mapping[str, float | None], shown: Callable[[float], str]) -> str:
    return _listed(
        f"{'an undefined share' if value is None else shown(value)} at {effort}" for effort, value in values.items()
    )


def _listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _share(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"

"""The numbers of recovery, each computed from the evidence; ``recovery_sentences`` says what they mean."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from moesaic.configs import CacheDtype, Effort
from moesaic.efficiency import (
    REFERENCE,
    Deployment,
    FrontierPoint,
    Quality,
    best_throughput,
    frontier_points,
    gain_at_accuracy,
    pareto_frontier,
    rate_ratios,
    recovered_share,
    retention,
)
from moesaic.errors import ArtifactError
from moesaic.report.evidence import EffortResult, Evaluation, Pair
from moesaic.report.findings import compare, longest_context
from moesaic.report.recovery import AVERAGED, DISTILLED, FP8, FP8_UNIT, PRUNED, Recovery, RecoveryEvidence

PARENT = "parent"
_SETTLED = 2.0
"""A difference of so many of its standard errors is more than the choice of problems explains."""


def recovery_frontier(evidence: RecoveryEvidence) -> list[FrontierPoint]:
    """Everything that was evaluated, as deployments; relative to the parent at its highest effort with a BF16 cache.

    All of the child's checkpoints share its architecture, and so its throughput; they are called by their stage. The
    averaged weights are the only ones of a model evaluated with an FP8 cache too.
    """
    models: dict[tuple[str, CacheDtype], Evaluation] = {(PARENT, "bf16"): evidence.parent}
    if evidence.parent_fp8:
        models[PARENT, "fp8"] = evidence.parent_fp8
    models |= {(stage, "bf16"): evidence.child.stages[stage] for stage in evidence.child.training_stages}
    models[AVERAGED, "fp8"] = evidence.child.stages[FP8]
    if evidence.baseline and evidence.baseline_pairs:
        name = evidence.baseline.candidate
        models |= {(name, "bf16"): evidence.baseline.stages[AVERAGED], (name, "fp8"): evidence.baseline.stages[FP8]}
    qualities = {
        Deployment(model, effort, kv): Quality(found.efforts[effort].accuracy, found.efforts[effort].tokens_per_request)
        for (model, kv), found in models.items()
        for effort in evidence.efforts
    }
    speeds = {(model, kv): _max_tokens_per_s(evidence, model, kv) for model, kv in models}
    return frontier_points(qualities, speeds, Deployment(PARENT, evidence.efforts[-1], REFERENCE.kv_cache))


def _max_tokens_per_s(evidence: RecoveryEvidence, model: str, kv_cache: CacheDtype) -> float:
    """``T_max`` [tokens/s] at the longest context; without a measurement of its own, FP8 has that of BF16.

    The baseline was timed beside the parent in a run of its own: its ratio to the parent there counts.
    """
    context = longest_context(evidence.search)
    pairs = evidence.search.pairs_fp8 if kv_cache == "fp8" and evidence.fp8_was_timed else evidence.search.pairs
    if evidence.baseline and model == evidence.baseline.candidate:
        old, new = (_fastest(evidence.baseline_pairs, context, which) for which in ("parent", "child"))
        return new / old * _fastest(evidence.search.pairs, context, "parent")
    return _fastest(pairs, context, PARENT if model == PARENT else "child")


def _fastest(pairs: Sequence[Pair], context: tuple[int, int], model: str) -> float:
    found = [pair for pair in pairs if (pair.setting.input_tokens, pair.setting.output_tokens) == context]
    if not found:
        raise ArtifactError(
            f"one of the measurements has no point of {context[0]} input and {context[1]} output tokens; "
            f"run all benchmarks with the same config"
        )
    return best_throughput(getattr(pair, model).tokens_per_s.median for pair in found)


def summarize_recovery(evidence: RecoveryEvidence) -> dict[str, Any]:
    """The entry ``recovery`` of ``summary.json``; its ``retention`` and the like are of the averaged child, BF16.

    With several rounds the last search began from an earlier round's child: ``searched_parent`` is false then.
    """
    points = recovery_frontier(evidence)
    stages = {stage: _stage(evidence, evidence.child, stage) for stage in evidence.child.stages}
    final = stages[AVERAGED]["efforts"]
    return {
        "candidate": evidence.child.candidate,
        "parameters": compare(evidence.parent.parameters, evidence.child.stages[AVERAGED].parameters),
        "searched_parent": evidence.parent.parameters == evidence.search.parent.parameters,
        "parent": _evaluated(evidence.parent, evidence.efforts),
        "parent_fp8": evidence.parent_fp8 and _evaluated(evidence.parent_fp8, evidence.efforts),
        "stages": stages,
        "retention": {effort: found["retention"] for effort, found in final.items()},
        "tokens_ratio": {effort: found["tokens_ratio"] for effort, found in final.items()},
        "recovered_by_distillation": {
            effort: found["recovered_share"] for effort, found in stages[DISTILLED]["efforts"].items()
        },
        "request_efficiency": _efficiency(evidence, points),
        "frontier": _frontier(evidence, points),
        "kv_cache": _kv_table(evidence),
        "baseline": evidence.baseline and _against_baseline(evidence, evidence.baseline),
        "distillation": _distillation(evidence.child),
        "traces": dict(evidence.child.traces),
    }


def _evaluated(evaluation: Evaluation, efforts: Sequence[Effort]) -> dict[str, Any]:
    return {
        "kv_cache": evaluation.kv_cache,
        "efforts": {effort: _figures(evaluation.efforts[effort]) for effort in efforts},
    }


def _figures(found: EffortResult) -> dict[str, Any]:
    return {
        "accuracy": found.accuracy,
        "standard_error": found.standard_error,
        "tokens_per_request": found.tokens_per_request,
        "truncated": found.truncated,
    }


def _stage(evidence: RecoveryEvidence, recovery: Recovery, stage: str) -> dict[str, Any]:
    """A stage's figures per effort, and what they are relative to the parent's with its cache in BF16."""
    efforts = {}
    for effort in evidence.efforts:
        found, parent = recovery.stages[stage].efforts[effort], evidence.parent.efforts[effort]
        pruned = recovery.stages[PRUNED].efforts[effort]
        efforts[effort] = _figures(found) | {
            "retention": retention(found.accuracy, parent.accuracy),
            "tokens_ratio": found.tokens_per_request / parent.tokens_per_request,
            "recovered_share": recovered_share(pruned.accuracy, found.accuracy, parent.accuracy),
            "tasks": {
                task: {
                    "parent": old.accuracy,
                    "child": found.tasks[task].accuracy,
                    "retention": retention(found.tasks[task].accuracy, old.accuracy),
                }
                for task, old in parent.tasks.items()
                if task in found.tasks
            },
        }
    return {"kv_cache": recovery.stages[stage].kv_cache, "efforts": efforts}


def _efficiency(evidence: RecoveryEvidence, points: Sequence[FrontierPoint]) -> dict[str, Any]:
    """Request rate over the parent's: at equal effort per stage, at the best point, and at no less accuracy."""
    input_tokens, output_tokens = longest_context(evidence.search)
    models = dict.fromkeys(point.deployment.model for point in points if point.deployment.model != PARENT)
    by_effort = {model: rate_ratios(points, model, PARENT, "bf16") for model in models}
    final = by_effort[AVERAGED]
    best = max(final, key=lambda effort: final[effort])
    children = [point for point in points if point.deployment.model == AVERAGED]
    parents = [point for point in points if point.deployment.model == PARENT and point.deployment.kv_cache == "bf16"]
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "best": final[best],
        "best_effort": best,
        "equal_effort": final,
        "equal_effort_fp8": rate_ratios(points, AVERAGED, PARENT, "fp8"),
        "fp8_was_timed": evidence.fp8_was_timed,
        "equal_accuracy": {goal.deployment.effort: gain_at_accuracy(children, goal) for goal in parents},
        "models": by_effort,
    }


def _frontier(evidence: RecoveryEvidence, points: Sequence[FrontierPoint]) -> dict[str, Any]:
    undominated = pareto_frontier(points)
    return {
        "relative_to": f"parent at {evidence.efforts[-1]} effort, KV cache in BF16",
        "points": [
            {
                "model": point.deployment.model,
                "effort": point.deployment.effort,
                "kv_cache": point.deployment.kv_cache,
                "requests_per_s": point.requests_per_s,
                "relative_rate": point.relative_rate,
                "accuracy": point.accuracy,
                "on_frontier": point in undominated,
            }
            for point in points
        ],
    }


def _kv_table(evidence: RecoveryEvidence) -> list[dict[str, Any]]:
    """The cache in BF16, in FP8 with unit scales and with calibrated ones; ``change`` is of accuracy against BF16."""
    child, parent = evidence.child, evidence.parent
    rows = [_kv_row("child", "bf16", child.stages[AVERAGED], child.stages[AVERAGED], evidence.efforts)]
    rows += [_kv_row("child", kv, child.stages[kv], child.stages[AVERAGED], evidence.efforts) for kv in (FP8_UNIT, FP8)]
    if evidence.parent_fp8:
        kv_cache = evidence.parent_fp8.kv_cache or FP8
        rows.append(_kv_row(PARENT, "bf16", parent, parent, evidence.efforts))
        rows.append(_kv_row(PARENT, kv_cache, evidence.parent_fp8, parent, evidence.efforts))
    return rows


def _kv_row(
    model: str, kv_cache: str, found: Evaluation, plain: Evaluation, efforts: Sequence[Effort]
) -> dict[str, Any]:
    return {
        "model": model,
        "kv_cache": kv_cache,
        "rounded": found.kv_cache is not None,
        "efforts": {
            effort: _figures(found.efforts[effort])
            | {"change": found.efforts[effort].accuracy - plain.efforts[effort].accuracy}
            for effort in efforts
        },
    }


def _against_baseline(evidence: RecoveryEvidence, baseline: Recovery) -> dict[str, Any]:
    """Child minus baseline after the same stages, with the standard error of the mean difference over efforts."""
    stages = [stage for stage in evidence.child.stages if stage in baseline.stages]
    return {
        "name": baseline.candidate,
        "parameters": baseline.stages[AVERAGED].parameters,
        "child_parameters": evidence.child.stages[AVERAGED].parameters,
        "memory_mib": _memories_mib(evidence, baseline),
        "timed": bool(evidence.baseline_pairs),
        "stages": {stage: _stage(evidence, baseline, stage) for stage in baseline.stages},
        "differences": {
            stage: _difference(evidence.child.stages[stage], baseline.stages[stage], evidence.efforts)
            for stage in stages
        },
    }


def _memories_mib(evidence: RecoveryEvidence, baseline: Recovery) -> dict[str, dict[str, float]]:
    """Of child and baseline per workload, by the cost table; nothing if the search does not know the baseline."""
    if baseline.candidate not in evidence.search.candidates:
        return {}
    child, other = evidence.search.child.memory_mib, evidence.search.candidates[baseline.candidate].memory_mib
    return {workload: {"child": child[workload], "baseline": other[workload]} for workload in child}


def _difference(child: Evaluation, baseline: Evaluation, efforts: Sequence[Effort]) -> dict[str, Any]:
    """The error as if efforts erred together and models apart: too large a one rather than too small."""
    by_effort = {effort: child.efforts[effort].accuracy - baseline.efforts[effort].accuracy for effort in efforts}
    mean = fmean(by_effort.values())
    errors = [fmean(found.efforts[effort].standard_error for effort in efforts) for found in (child, baseline)]
    error = math.hypot(*errors)
    return {
        "efforts": by_effort,
        "mean": mean,
        "standard_error": error,
        "settled": abs(mean) > _SETTLED * error,
    }


def _distillation(recovery: Recovery) -> dict[str, Any]:
    """First and last value of everything that was also computed on held-out traces."""
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] = recovery.series()
    return {
        "steps": max((row["step"] for row in recovery.curve), default=0),
        "curves": {
            name: {which: {"first": points[0][1], "last": points[-1][1]} for which, points in found.items()}
            for name, found in curves.items()
        },
    }

"""Recovery in the report: the evaluations of child and baseline after every stage, and the figures from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from moesaic.core.config import CacheDtype, Effort
from moesaic.core.errors import ArtifactError
from moesaic.measure.efficiency import (
    REFERENCE,
    Deployment,
    FrontierPoint,
    best_throughput,
    frontier_points,
    gain_at_accuracy,
    rate_ratios,
    recovered_share,
)
from moesaic.measure.paired import difference
from moesaic.measure.report.evidence import (
    EffortResult,
    Evaluation,
    Evidence,
    Pair,
    check_problems,
    common_efforts,
    read_evaluation,
    read_pairs,
)
from moesaic.measure.report.findings import (
    compare,
    compare_accuracy,
    compare_tasks,
    describe_points,
    evaluated_qualities,
    longest_context,
    mean_verdicts,
    winner,
)

PARENT = "parent"
PRUNED, DISTILLED, AVERAGED, FP8_UNIT, FP8 = "pruned", "distilled", "averaged", "fp8_unit", "fp8"
_NEEDED = (PRUNED, DISTILLED, AVERAGED, FP8_UNIT, FP8)
_HELD_OUT = "held_out_"
"""A training curve's ``held_out_x`` is ``x`` on traces that were never trained on."""


@dataclass(frozen=True)
class Recovery:
    """A ``recovery.json``."""

    candidate: str
    stages: Mapping[str, Evaluation]
    """The evaluations by stage, in order; the two with an FP8 cache are of the averaged weights."""
    traces: Mapping[Effort, Mapping[str, float]]
    """Figures of the traces, by effort."""
    curve: Sequence[Mapping[str, float]]
    """The steps of the distillation, each with its figures by name."""

    @property
    def policies(self) -> list[str]:
        """The stages that are policies."""
        return [stage for stage in self.stages if stage not in _NEEDED]

    @property
    def training_stages(self) -> list[str]:
        """The stages that changed weights, pruning first."""
        return [PRUNED, DISTILLED, *self.policies, AVERAGED]

    def series(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Per quantity with a held-out counterpart: (step, value) on training and on held-out traces.

        A part of the loss that weighs nothing is not computed, and zero throughout; it is left out.
        """
        computed = dict.fromkeys(name for row in self.curve for name, value in row.items() if value and name != "step")
        return {
            name: {"training": self._points(name), "held out": self._points(_HELD_OUT + name)}
            for name in computed
            if _HELD_OUT + name in computed
        }

    def _points(self, name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in self.curve if name in row]


@dataclass(frozen=True)
class RecoveryEvidence:
    """The recovery of the child whose search the rest of the evidence is about."""

    search: Evidence
    child: Recovery
    baseline: Recovery | None
    """Another child of the same budget after the same recovery."""
    parent_fp8: Evaluation | None
    """The parent with an FP8 cache."""
    baseline_pairs: Sequence[Pair]
    """Speeds of the parent and the baseline, side by side."""

    @property
    def parent(self) -> Evaluation:
        """The parent with its cache in BF16."""
        return self.search.evaluation_parent

    @property
    def recoveries(self) -> list[Recovery]:
        """The recoveries of the child and, if there is one, of the baseline."""
        return [self.child] if self.baseline is None else [self.child, self.baseline]

    @property
    def evaluations(self) -> list[Evaluation]:
        """All of them, the parent's first."""
        after_stages = [evaluation for recovery in self.recoveries for evaluation in recovery.stages.values()]
        return [self.parent, *after_stages, *([self.parent_fp8] if self.parent_fp8 else [])]

    @property
    def efforts(self) -> list[Effort]:
        """The efforts at which everything was evaluated, lowest first."""
        return common_efforts(self.evaluations)

    @property
    def fp8_was_timed(self) -> bool:
        """Whether speeds were measured with an FP8 cache; if not, those of BF16 stand in for them."""
        return bool(self.search.pairs_fp8)


def read_recovery(
    search: Evidence,
    *,
    recovery: Mapping[str, Any],
    recovery_baseline: Mapping[str, Any] | None,
    evaluation_parent_fp8: Mapping[str, Any] | None,
    measurements_baseline: Mapping[str, Any] | None,
) -> RecoveryEvidence:
    """Read the stages' JSON, and check that it fits together.

    Raises:
        ArtifactError: if something is missing, or the child recovered is not the one the search is about.
    """
    try:
        evidence = RecoveryEvidence(
            search=search,
            child=_read(recovery),
            baseline=None if recovery_baseline is None else _read(recovery_baseline),
            parent_fp8=None if evaluation_parent_fp8 is None else read_evaluation(evaluation_parent_fp8),
            baseline_pairs=() if measurements_baseline is None else read_pairs(measurements_baseline["points"]),
        )
    except (KeyError, TypeError, ValidationError) as broken:
        raise ArtifactError(f"a recovery given to the report cannot be read ({broken!r}); run its stage again") from (
            broken
        )
    _check(evidence)
    return evidence


def _read(entry: Mapping[str, Any]) -> Recovery:
    stages = {row["stage"]: read_evaluation(row["evaluation"]) for row in entry["stages"]}
    if missing := [stage for stage in _NEEDED if stage not in stages]:
        raise ArtifactError(f"the recovery of {entry['candidate']!r} lacks {missing}; run gather_recovery again")
    return Recovery(entry["candidate"], stages, entry["traces"]["efforts"], entry["curve"])


def _check(evidence: RecoveryEvidence) -> None:
    given, wanted = evidence.child.candidate, evidence.search.child.name
    if given != wanted:
        raise ArtifactError(f"the recovery given is of {given!r}, but the child evaluated is {wanted!r}; give its own")
    if evidence.baseline and evidence.baseline.candidate == given:
        raise ArtifactError(f"recovery_baseline is of {given!r} itself; give that of another candidate")
    check_problems(evidence.evaluations)
    if not evidence.efforts:
        raise ArtifactError("recovery and parent were evaluated at no common effort; evaluate all with the same config")


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
    deployed = {
        Deployment(model, effort, kv_cache): evaluation
        for (model, kv_cache), evaluation in models.items()
        for effort in evidence.efforts
    }
    speeds = {(model, kv_cache): _max_tokens_per_s(evidence, model, kv_cache) for model, kv_cache in models}
    reference = Deployment(PARENT, evidence.efforts[-1], REFERENCE.kv_cache)
    return frontier_points(evaluated_qualities(deployed), speeds, reference)


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
    speeds = [getattr(pair, model).tokens_per_s.median for pair in pairs if pair.setting.context == context]
    if not speeds:
        raise ArtifactError(
            f"one of the measurements has no point of {context[0]} input and {context[1]} output tokens; "
            f"run all benchmarks with the same config"
        )
    return best_throughput(speeds)


def summarize_recovery(evidence: RecoveryEvidence) -> dict[str, Any]:
    """The entry ``recovery`` of ``summary.json``; its ``retention`` and the like are of the averaged child, BF16.

    With several rounds the last search began from an earlier round's child: ``searched_parent`` is false then.
    """
    points, child, efforts = recovery_frontier(evidence), evidence.child, evidence.efforts
    stages = {stage: _stage(evidence, child, stage) for stage in child.stages}
    final, distilled = stages[AVERAGED]["efforts"], stages[DISTILLED]["efforts"]
    return {
        "candidate": child.candidate,
        "parameters": compare(evidence.parent.parameters, child.stages[AVERAGED].parameters),
        "searched_parent": evidence.parent.parameters == evidence.search.parent.parameters,
        "parent": _evaluated(evidence.parent, efforts),
        "parent_fp8": evidence.parent_fp8 and _evaluated(evidence.parent_fp8, efforts),
        "stages": stages,
        "retention": {effort: figures["retention"] for effort, figures in final.items()},
        "differences": {effort: figures["difference"] for effort, figures in final.items()},
        "tokens_ratio": {effort: figures["tokens_ratio"] for effort, figures in final.items()},
        "recovered_by_distillation": {effort: figures["recovered_share"] for effort, figures in distilled.items()},
        "accuracy_changes": _accuracy_changes(evidence),
        "request_efficiency": _efficiency(evidence, points),
        "frontier": {
            "relative_to": f"parent at {efforts[-1]} effort, KV cache in BF16",
            "points": describe_points(points),
        },
        "kv_cache": _kv_table(evidence),
        "baseline": evidence.baseline and _against_baseline(evidence, evidence.baseline),
        "distillation": _distillation(child),
        "traces": dict(child.traces),
    }


def _evaluated(evaluation: Evaluation, efforts: Sequence[Effort]) -> dict[str, Any]:
    return {
        "kv_cache": evaluation.kv_cache,
        "efforts": {effort: _figures(evaluation.efforts[effort]) for effort in efforts},
    }


def _figures(result: EffortResult) -> dict[str, Any]:
    shown = ("accuracy", "tokens_per_request", "truncated", "standard_error")
    return {name: getattr(result, name) for name in shown}


def _stage(evidence: RecoveryEvidence, recovery: Recovery, stage: str) -> dict[str, Any]:
    """A stage's figures per effort, and what they are relative to the parent's with its cache in BF16."""
    entry = _evaluated(recovery.stages[stage], evidence.efforts)
    for effort, figures in entry["efforts"].items():
        result, parent = recovery.stages[stage].efforts[effort], evidence.parent.efforts[effort]
        pruned = recovery.stages[PRUNED].efforts[effort]
        accuracy = compare_accuracy(parent, result)
        figures |= {
            "retention": accuracy["retention"],
            "difference": accuracy["difference"],
            "tokens_ratio": result.tokens_per_request / parent.tokens_per_request,
            "recovered_share": recovered_share(pruned.accuracy, result.accuracy, parent.accuracy),
            "tasks": compare_tasks(parent, result),
        }
    return entry


def _gains(after: Evaluation, before: Evaluation, efforts: Sequence[Effort]) -> dict[str, dict[str, Any]]:
    """The difference in accuracy by effort."""
    return {
        effort: asdict(difference(after.efforts[effort].verdicts, before.efforts[effort].verdicts))
        for effort in efforts
    }


def _accuracy_changes(evidence: RecoveryEvidence) -> dict[str, Any]:
    """What pruning, distillation and reinforcement learning each changed in what they were given."""
    stages, efforts = evidence.child.stages, evidence.efforts
    trained = [*evidence.child.policies, AVERAGED]
    return {
        "pruning": _gains(stages[PRUNED], evidence.parent, efforts),
        "distillation": _gains(stages[DISTILLED], stages[PRUNED], efforts),
        "reinforcement": {stage: _gains(stages[stage], stages[DISTILLED], efforts) for stage in trained},
    }


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


def _kv_table(evidence: RecoveryEvidence) -> list[dict[str, Any]]:
    """The cache in BF16, in FP8 with unit scales and with calibrated ones; ``change`` is of accuracy against BF16."""
    averaged, efforts = evidence.child.stages[AVERAGED], evidence.efforts
    rows = [_kv_row("child", "bf16", averaged, averaged, efforts)]
    rows += [_kv_row("child", stage, evidence.child.stages[stage], averaged, efforts) for stage in (FP8_UNIT, FP8)]
    if evidence.parent_fp8:
        kv_cache = evidence.parent_fp8.kv_cache or FP8
        rows.append(_kv_row(PARENT, "bf16", evidence.parent, evidence.parent, efforts))
        rows.append(_kv_row(PARENT, kv_cache, evidence.parent_fp8, evidence.parent, efforts))
    return rows


def _kv_row(
    model: str, kv_cache: str, evaluation: Evaluation, in_bf16: Evaluation, efforts: Sequence[Effort]
) -> dict[str, Any]:
    gains = _gains(evaluation, in_bf16, efforts)
    return {
        "model": model,
        "kv_cache": kv_cache,
        "rounded": evaluation.kv_cache is not None,
        "efforts": {effort: _figures(evaluation.efforts[effort]) | {"change": gains[effort]} for effort in efforts},
    }


def _against_baseline(evidence: RecoveryEvidence, baseline: Recovery) -> dict[str, Any]:
    """Child minus baseline after the same stages."""
    child = evidence.child
    return {
        "name": baseline.candidate,
        "parameters": baseline.stages[AVERAGED].parameters,
        "child_parameters": child.stages[AVERAGED].parameters,
        "memory_mib": _memories_mib(evidence, baseline),
        "timed": bool(evidence.baseline_pairs),
        "stages": {stage: _stage(evidence, baseline, stage) for stage in baseline.stages},
        "differences": {
            stage: _difference(child.stages[stage], baseline.stages[stage], evidence.efforts)
            for stage in child.stages
            if stage in baseline.stages
        },
    }


def _memories_mib(evidence: RecoveryEvidence, baseline: Recovery) -> dict[str, dict[str, float]]:
    """Of child and baseline per workload, by the cost table; nothing if the search does not know the baseline."""
    if baseline.candidate not in evidence.search.candidates:
        return {}
    child, other = evidence.search.child.memory_mib, evidence.search.candidates[baseline.candidate].memory_mib
    return {workload: {"child": child[workload], "baseline": other[workload]} for workload in child}


def _difference(child: Evaluation, baseline: Evaluation, efforts: Sequence[Effort]) -> dict[str, Any]:
    """By effort, and of the mean over efforts, for which a problem counts once."""
    mean = difference(*(mean_verdicts([model], efforts) for model in (child, baseline)))
    return {"efforts": _gains(child, baseline, efforts), "mean": asdict(mean), "winner": winner(mean.sign)}


def _distillation(recovery: Recovery) -> dict[str, Any]:
    """First and last value of everything that was also computed on held-out traces."""
    return {
        "steps": max((row["step"] for row in recovery.curve), default=0),
        "curves": {
            name: {which: {"first": points[0][1], "last": points[-1][1]} for which, points in curve.items()}
            for name, curve in recovery.series().items()
        },
    }

"""The figures of the report, computed from the evidence, and which method they favour. Templates word them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from moesaic.core.config import Effort
from moesaic.costs.block_costs import MIB, CostTable
from moesaic.costs.workload import Workload
from moesaic.measure.efficiency import (
    REFERENCE,
    Deployment,
    FrontierPoint,
    Quality,
    best_throughput,
    frontier_points,
    pareto_frontier,
    retention,
)
from moesaic.measure.paired import Difference, Verdicts, average, difference
from moesaic.measure.report.evidence import Candidate, EffortResult, Evaluation, Evidence, Pair, Setting, TaskResult


@dataclass(frozen=True)
class Prediction:
    """Speed-ups of the child over the parent under one workload: by the cost table, and measured."""

    workload: str
    predicted: Mapping[str, float]
    """Speed-ups of throughput, prefill and decode."""
    measured: Mapping[str, float] | None
    """Of the same quantities; None if the benchmark has no point of this workload."""


def summarize(evidence: Evidence) -> dict[str, Any]:
    """What ``summary.json`` says of the search; tables and sentences of the page are made of it."""
    parent, child = evidence.parent, evidence.child
    methods = _selection_methods(evidence)
    return {
        "child": child.name,
        "problems": asdict(evidence.evaluation_child.problems),
        "parameters": compare(parent.parameters, child.parameters),
        "experts": compare(parent.num_experts, child.num_experts),
        "experts_per_token": compare(parent.architecture.experts_per_token, child.architecture.experts_per_token),
        "expert_width": compare(parent.architecture.expert_width, child.architecture.expert_width),
        "windowed_layers": _count_windows(evidence),
        "memory_mib": {name: compare(parent.memory_mib[name], child.memory_mib[name]) for name in parent.memory_mib},
        "kv_mib_per_request": {
            workload.name: compare(*(_kv_mib_per_request(evidence.costs, model, workload) for model in (parent, child)))
            for workload in evidence.costs.workloads
        },
        "efforts": {effort: _compare_effort(evidence, effort) for effort in evidence.efforts},
        "throughput": {
            f"{context[0]}/{context[1]}": _compare_throughput(evidence, context) for context in contexts(evidence)
        },
        "predictions": [asdict(prediction) for prediction in predictions(evidence)],
        "request_efficiency": _request_efficiency(evidence),
        "refinement": _refinement(evidence),
        "rivals": methods,
        "verdicts": _verdicts(evidence, methods),
        "skipped": dict(evidence.skipped),
        "hardware": dict(evidence.hardware),
    }


def compare(parent: float, child: float) -> dict[str, float]:
    """A figure of parent and child, and their ratio."""
    return {"parent": parent, "child": child, "ratio": child / parent}


def compare_accuracy(parent: EffortResult | TaskResult, child: EffortResult | TaskResult) -> dict[str, Any]:
    """The accuracy of both models, the share that the child keeps, and the difference with its interval."""
    return {
        "parent": parent.accuracy,
        "child": child.accuracy,
        "retention": retention(child.accuracy, parent.accuracy),
        "difference": asdict(difference(child.verdicts, parent.verdicts)),
    }


def compare_tasks(parent: EffortResult, child: EffortResult) -> dict[str, dict[str, Any]]:
    """The accuracy of both models on every task."""
    return {task: compare_accuracy(result, child.tasks[task]) for task, result in parent.tasks.items()}


def mean_verdicts(evaluations: Iterable[Evaluation], efforts: Sequence[Effort]) -> Verdicts:
    """The mean over efforts and models, problem by problem."""
    return average([evaluation.efforts[effort].verdicts for evaluation in evaluations for effort in efforts])


def _count_windows(evidence: Evidence) -> dict[str, int]:
    """The number of the parent's full-attention layers, and of those with a window in the child."""
    pairs = zip(evidence.parent.architecture.blocks, evidence.child.architecture.blocks, strict=True)
    windowed = [new.window is not None for old, new in pairs if old.window is None]
    full, became_windows = len(windowed), sum(windowed)
    return {"full_in_parent": full, "windowed_in_child": became_windows, "full_in_child": full - became_windows}


def _kv_mib_per_request(costs: CostTable, candidate: Candidate, workload: Workload) -> float:
    """KV cache of one request of a workload at its full length."""
    blocks = candidate.architecture.blocks
    return sum(costs.blocks[block].workloads[workload.name].kv_bytes for block in blocks) / MIB


def _compare_effort(evidence: Evidence, effort: Effort) -> dict[str, Any]:
    parent, child = (evaluation.efforts[effort] for evaluation in evidence.evaluations.values())
    return {
        "accuracy": compare_accuracy(parent, child),
        "tokens_per_request": compare(parent.tokens_per_request, child.tokens_per_request),
        "truncated": {"parent": parent.truncated, "child": child.truncated},
        "tasks": compare_tasks(parent, child),
    }


def contexts(evidence: Evidence) -> list[tuple[int, int]]:
    """The measured contexts as (input tokens, output tokens), shortest first."""
    return sorted({pair.setting.context for pair in evidence.pairs})


def longest_context(evidence: Evidence) -> tuple[int, int]:
    """The (input tokens, output tokens) of the longest prompts; of several, the one of most batch sizes."""
    return max(contexts(evidence), key=lambda context: (context[0], len(context_pairs(evidence, context)), context[1]))


def context_pairs(evidence: Evidence, context: tuple[int, int]) -> list[Pair]:
    """All measured batch sizes of one context."""
    return [pair for pair in evidence.pairs if pair.setting.context == context]


def _max_tokens_per_s(evidence: Evidence, context: tuple[int, int]) -> dict[str, float]:
    """``T_max`` of both models at one context."""
    pairs = context_pairs(evidence, context)
    return {
        model: best_throughput(getattr(pair, model).tokens_per_s.median for pair in pairs)
        for model in evidence.evaluations
    }


def _compare_throughput(evidence: Evidence, context: tuple[int, int]) -> dict[str, Any]:
    return {
        "best": compare(*_max_tokens_per_s(evidence, context).values()),
        "speedup_by_batch": {str(pair.setting.batch_size): pair.speedup for pair in context_pairs(evidence, context)},
    }


def predictions(evidence: Evidence) -> list[Prediction]:
    """Predicted and measured speed-ups of every workload of the cost table."""
    pairs = {pair.setting: pair for pair in evidence.pairs}
    entries = []
    for workload in evidence.costs.workloads:
        parent, child = (_runtime_ms(evidence.costs, model, workload) for model in (evidence.parent, evidence.child))
        pair = pairs.get(Setting(workload.input_tokens, workload.output_tokens, workload.concurrency))
        predicted = {quantity: parent[quantity] / child[quantity] for quantity in parent}
        entries.append(Prediction(workload.name, predicted, None if pair is None else _measured_speedups(pair)))
    return entries


def _runtime_ms(costs: CostTable, candidate: Candidate, workload: Workload) -> dict[str, float]:
    runtimes = [costs.fixed.workloads[workload.name]]
    runtimes += [costs.blocks[block].workloads[workload.name] for block in candidate.architecture.blocks]
    prefill, decode = (sum(getattr(runtime, key) for runtime in runtimes) for key in ("prefill_ms", "decode_ms"))
    return {"throughput": prefill + workload.output_tokens * decode, "prefill": prefill, "decode": decode}


def _measured_speedups(pair: Pair) -> dict[str, float]:
    return {
        "throughput": pair.speedup,
        "prefill": pair.parent.prefill_ms.median / pair.child.prefill_ms.median,
        "decode": pair.parent.decode_ms.median / pair.child.decode_ms.median if pair.child.decode_ms.median else 1.0,
    }


def evaluated_qualities(evaluations: Mapping[Deployment, Evaluation]) -> dict[Deployment, Quality]:
    """Accuracy and tokens per request of each deployment at its effort."""
    results = {deployment: evaluation.efforts[deployment.effort] for deployment, evaluation in evaluations.items()}
    return {deployment: Quality(result.accuracy, result.tokens_per_request) for deployment, result in results.items()}


def request_frontier(evidence: Evidence) -> list[FrontierPoint]:
    """Parent and child at every effort: accuracy against request rate at the longest context measured.

    Rates are relative to the parent at its highest effort.
    """
    speeds = _max_tokens_per_s(evidence, longest_context(evidence))
    deployed = {
        Deployment(model, effort): evaluation
        for model, evaluation in evidence.evaluations.items()
        for effort in evidence.efforts
    }
    return frontier_points(
        evaluated_qualities(deployed),
        {(model, REFERENCE.kv_cache): speed for model, speed in speeds.items()},
        Deployment("parent", evidence.efforts[-1]),
    )


def compare_request_rates(points: Iterable[FrontierPoint]) -> dict[str, Any]:
    """Request rate of the child over the parent's at equal effort, each with the KV cache it has here."""
    rates = {(point.deployment.model, point.deployment.effort): point.requests_per_s for point in points}
    efforts = [effort for model, effort in rates if model == "parent"]
    by_effort = {effort: rates["child", effort] / rates["parent", effort] for effort in efforts}
    best = max(efforts, key=lambda effort: by_effort[effort])
    return {
        "relative_to": f"parent at {efforts[-1]} effort",
        "child_over_parent": by_effort,
        "best_effort": best,
        "best": by_effort[best],
    }


def describe_points(points: Sequence[FrontierPoint]) -> list[dict[str, Any]]:
    """The points of a frontier, for ``summary.json``."""
    undominated = pareto_frontier(points)
    return [
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
    ]


def _request_efficiency(evidence: Evidence) -> dict[str, Any]:
    context, points = longest_context(evidence), request_frontier(evidence)
    at = {"input_tokens": context[0], "output_tokens": context[1], "points": describe_points(points)}
    return at | compare_request_rates(points)


def _refinement(evidence: Evidence) -> dict[str, Any]:
    """What measuring whole assemblies gave: the search's own choice comes first, the best one became the child."""
    first = evidence.refinement[0]
    best = min(evidence.refinement, key=lambda assembly: assembly.measured)
    misses = {
        name: fmean(abs(assembly.measured - getattr(assembly, name)) for assembly in evidence.refinement)
        for name in ("sum", "expected")
    }
    return {"evaluations": len(evidence.refinement), "first": asdict(first), "best": asdict(best), "misses": misses}


def _selection_methods(evidence: Evidence) -> list[dict[str, Any]]:
    """The child first, then the other ways of choosing blocks; the seeds of random are taken together."""
    groups = {evidence.child.name: [evidence.child.name]}
    for name in evidence.candidates:
        if name != evidence.child.name:
            groups.setdefault("random" if name.startswith("random-") else name, []).append(name)
    return [_selection_method(evidence, group, names) for group, names in groups.items()]


def _selection_method(evidence: Evidence, group: str, names: Sequence[str]) -> dict[str, Any]:
    """What the assemblies of one method cost, and how they answer before any training."""
    candidates, parent = [evidence.candidates[name] for name in names], evidence.parent
    evaluations = _evaluations_of(evidence, names)
    results = [(effort, run.efforts[effort].accuracy) for run in evaluations for effort in evidence.efforts]
    verdicts = mean_verdicts(evaluations, evidence.efforts) if evaluations and group != evidence.child.name else None
    accuracies = {effort: [value for at, value in results if at == effort] for effort in evidence.efforts}
    return {
        "name": group,
        "models": list(names),
        "damage": _mean([candidate.damage for candidate in candidates]),
        "measured": _mean([candidate.measured for candidate in candidates]),
        "memory_ratio": _ratios([candidate.memory_mib for candidate in candidates], parent.memory_mib),
        "throughput_ratio": _ratios(
            [candidate.throughput_tokens_per_s for candidate in candidates], parent.throughput_tokens_per_s
        ),
        "breaks": [limit for candidate in candidates for limit in candidate.breaks],
        "parameters": fmean(candidate.parameters for candidate in candidates),
        "experts": fmean(candidate.num_experts for candidate in candidates),
        "experts_per_token": fmean(candidate.architecture.experts_per_token for candidate in candidates),
        "expert_width": fmean(candidate.architecture.expert_width for candidate in candidates),
        "accuracy": {
            effort: {"mean": fmean(values), "min": min(values), "max": max(values)} if values else None
            for effort, values in accuracies.items()
        },
        "mean_accuracy": fmean(value for _, value in results) if results else None,
        "child_minus": verdicts and asdict(difference(_verdicts_of_child(evidence), verdicts)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if one of them is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _ratios(costs: Sequence[Mapping[str, float]], parent: Mapping[str, float]) -> dict[str, float]:
    """The mean of a cost under every workload, over the parent's."""
    return {workload: fmean(cost[workload] for cost in costs) / whole for workload, whole in parent.items()}


def _verdicts_of_child(evidence: Evidence) -> Verdicts:
    return mean_verdicts([evidence.evaluation_child], evidence.efforts)


def _evaluations_of(evidence: Evidence, names: Sequence[str]) -> list[Evaluation]:
    every = (*evidence.baselines, evidence.evaluation_child)
    return [evaluation for evaluation in every if evaluation.name in names]


def _verdicts(evidence: Evidence, methods: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The child against the best baseline within its limits, by measured damage, and by accuracy before training.

    None where there is no baseline, or none was evaluated. Damages that differ by rounding alone are equal; accuracies
    are told apart if the interval of their difference excludes 0.
    """
    child, *others = methods
    baselines = [method for method in others if not method["name"].startswith("puzzle")]
    ran = [method for method in baselines if method["measured"] is not None and method["name"] != "unrefined"]
    least = min(ran, key=lambda method: method["measured"], default=None)
    evaluated = [method for method in baselines if method["mean_accuracy"] is not None and not method["breaks"]]
    best = max(evaluated, key=lambda method: method["mean_accuracy"], default=None)
    verdicts: dict[str, dict[str, Any] | None] = {"damage": None, "accuracy": None}
    if least and child["measured"] is not None:
        tie = math.isclose(child["measured"], least["measured"], rel_tol=1e-9)
        verdicts["damage"] = _verdict("measured", child, least, 0 if tie else least["measured"] - child["measured"])
    if best and child["mean_accuracy"] is not None:
        ahead = Difference(**best["child_minus"])
        verdict = _verdict("mean_accuracy", child, best, ahead.sign)
        verdicts["accuracy"] = verdict | {"difference": asdict(ahead)}
    return verdicts


def _verdict(quantity: str, child: Mapping[str, Any], baseline: Mapping[str, Any], lead: float) -> dict[str, Any]:
    figures = {"child": child[quantity], "baseline": baseline[quantity], "name": baseline["name"]}
    return figures | {"winner": winner(lead)}


def winner(lead: float) -> str:
    """Who is better, by what the child leads by."""
    return "child" if lead > 0 else "baseline" if lead < 0 else "neither"

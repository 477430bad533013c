"""The numbers of the report, each computed from the evidence, and the sentences that say what they mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moesaic.configs import CacheDtype, Effort, Workload
from moesaic.costs import CostTable
from moesaic.efficiency import (
    Deployment,
    FrontierPoint,
    Quality,
    best_throughput,
    frontier_points,
    pareto_frontier,
    retention,
)
from moesaic.report.evidence import Evaluation, Evidence, Pair, Setting, Solution

_KV: CacheDtype = "bf16"
_TIE = 0.005
"""Accuracies closer than half a point are called equal."""


@dataclass(frozen=True)
class Prediction:
    """Speed-ups of the child over the parent under one workload: by the cost table, and measured."""

    workload: str
    predicted: Mapping[str, float]
    """Of throughput, prefill and decode."""
    measured: Mapping[str, float] | None
    """The same; None if the benchmark has no point of this workload."""


@dataclass(frozen=True)
class Rival:
    """A way of choosing blocks, with what its assemblies cost and how they answer. Random seeds are one rival."""

    name: str
    solutions: Sequence[Solution]
    evaluations: Sequence[Evaluation]

    def accuracies(self, effort: Effort) -> list[float]:
        """The suite accuracy of each of its models at one effort."""
        return [evaluation.efforts[effort].accuracy for evaluation in self.evaluations if effort in evaluation.efforts]

    @property
    def damage(self) -> float:
        """The sum of scores, the mean over its models."""
        return fmean(solution.damage for solution in self.solutions)

    @property
    def mean_accuracy(self) -> float | None:
        """The mean over its models and their efforts; None if none was evaluated."""
        found = [result.accuracy for evaluation in self.evaluations for result in evaluation.efforts.values()]
        return fmean(found) if found else None


def rivals(evidence: Evidence) -> list[Rival]:
    """The child first, then the baselines, the seeds of random taken together."""
    evaluated = {evaluation.name: evaluation for evaluation in (*evidence.baselines, evidence.evaluation_child)}
    groups: dict[str, list[str]] = {evidence.child.name: [evidence.child.name]}
    for name in evidence.candidates:
        groups.setdefault("random" if name.startswith("random-") else name, []).append(name)
    groups[evidence.child.name] = [evidence.child.name]
    return [
        Rival(
            group,
            [evidence.candidates[name] for name in names],
            [evaluated[name] for name in names if name in evaluated],
        )
        for group, names in groups.items()
    ]


def longest_context(evidence: Evidence) -> tuple[int, int]:
    """The (input tokens, output tokens) of the longest prompts; of several, the one of most batch sizes."""
    return max(contexts(evidence), key=lambda context: (context[0], len(context_pairs(evidence, *context)), context[1]))


def context_pairs(evidence: Evidence, input_tokens: int, output_tokens: int) -> list[Pair]:
    """All measured batch sizes of one context."""
    return [
        pair
        for pair in evidence.pairs
        if (pair.setting.input_tokens, pair.setting.output_tokens) == (input_tokens, output_tokens)
    ]


def contexts(evidence: Evidence) -> list[tuple[int, int]]:
    """The measured contexts as (input tokens, output tokens), shortest first."""
    return sorted({(pair.setting.input_tokens, pair.setting.output_tokens) for pair in evidence.pairs})


def request_frontier(evidence: Evidence, input_tokens: int, output_tokens: int) -> list[FrontierPoint]:
    """Parent and child at every effort: accuracy against request rate relative to the parent at its highest effort."""
    best = _best(evidence, input_tokens, output_tokens)
    speeds = {(model, _KV): speed for model, speed in best.items()}
    qualities = {
        Deployment(model, effort, _KV): Quality(result.accuracy, result.tokens_per_request)
        for model, evaluation in (("parent", evidence.evaluation_parent), ("child", evidence.evaluation_child))
        for effort, result in evaluation.efforts.items()
        if effort in evidence.efforts
    }
    return frontier_points(qualities, speeds, Deployment("parent", evidence.efforts[-1], _KV))


def _best(evidence: Evidence, input_tokens: int, output_tokens: int) -> dict[str, float]:
    """``T_max`` of both models at one context."""
    pairs = context_pairs(evidence, input_tokens, output_tokens)
    return {
        model: best_throughput(getattr(pair, model).tokens_per_s.median for pair in pairs)
        for model in ("parent", "child")
    }


def predictions(evidence: Evidence) -> list[Prediction]:
    """Predicted and measured speed-ups of every workload of the cost table."""
    measured = {pair.setting: pair for pair in evidence.pairs}
    found = []
    for workload in evidence.costs.workloads:
        old, new = (_runtime_ms(evidence.costs, model, workload) for model in (evidence.parent, evidence.child))
        pair = measured.get(Setting(workload.input_tokens, workload.output_tokens, workload.concurrency))
        speedups = {key: old[key] / new[key] for key in old}
        found.append(Prediction(workload.name, speedups, None if pair is None else _measured(pair)))
    return found


def _runtime_ms(costs: CostTable, solution: Solution, workload: Workload) -> dict[str, float]:
    runtimes = [costs.fixed.workloads[workload.name]]
    runtimes += [costs.blocks[block].workloads[workload.name] for block in solution.architecture.blocks]
    prefill, decode = (sum(getattr(runtime, key) for runtime in runtimes) for key in ("prefill_ms", "decode_ms"))
    return {"throughput": prefill + workload.output_tokens * decode, "prefill": prefill, "decode": decode}


def _measured(pair: Pair) -> dict[str, float]:
    return {
        "throughput": pair.speedup,
        "prefill": pair.parent.prefill_ms.median / pair.child.prefill_ms.median,
        "decode": pair.parent.decode_ms.median / pair.child.decode_ms.median if pair.child.decode_ms.median else 1.0,
    }


def kv_mib_per_request(evidence: Evidence, solution: Solution, workload: Workload) -> float:
    """KV cache of one request of a workload at its full length."""
    blocks = solution.architecture.blocks
    return sum(evidence.costs.blocks[block].workloads[workload.name].kv_bytes for block in blocks) / 2**20


def summarize(evidence: Evidence) -> dict[str, Any]:
    """The content of ``summary.json``; the page's tables and sentences are made of it."""
    parent, child = evidence.parent, evidence.child
    return {
        "child": child.name,
        "parameters": compare(parent.parameters, child.parameters),
        "experts": compare(parent.num_experts, child.num_experts),
        "windowed_layers": _windowed(evidence),
        "memory_mib": {name: compare(parent.memory_mib[name], child.memory_mib[name]) for name in parent.memory_mib},
        "kv_mib_per_request": {
            workload.name: compare(*(kv_mib_per_request(evidence, model, workload) for model in (parent, child)))
            for workload in evidence.costs.workloads
        },
        "efforts": {effort: _effort(evidence, effort) for effort in evidence.efforts},
        "throughput": {f"{tokens}/{new}": _context(evidence, tokens, new) for tokens, new in contexts(evidence)},
        "predictions": [
            {"workload": found.workload, "predicted": dict(found.predicted), "measured": found.measured}
            for found in predictions(evidence)
        ],
        "request_efficiency": _request_efficiency(evidence),
        "rivals": [_rival(rival, evidence.efforts) for rival in rivals(evidence)],
        "skipped": dict(evidence.skipped),
        "hardware": dict(evidence.hardware),
    }


def compare(parent: float, child: float) -> dict[str, float]:
    """A figure of both models, and its ratio."""
    return {"parent": parent, "child": child, "ratio": child / parent}


def _windowed(evidence: Evidence) -> dict[str, int]:
    pairs = zip(evidence.parent.architecture.blocks, evidence.child.architecture.blocks, strict=True)
    full = [new.window is not None for old, new in pairs if old.window is None]
    return {"full_in_parent": len(full), "windowed_in_child": sum(full)}


def _effort(evidence: Evidence, effort: Effort) -> dict[str, Any]:
    old, new = (run.efforts[effort] for run in (evidence.evaluation_parent, evidence.evaluation_child))
    return {
        "accuracy": {"parent": old.accuracy, "child": new.accuracy, "retention": retention(new.accuracy, old.accuracy)},
        "tokens_per_request": compare(old.tokens_per_request, new.tokens_per_request),
        "truncated": {"parent": old.truncated, "child": new.truncated},
        "tasks": {
            task: {
                "parent": found.accuracy,
                "child": new.tasks[task].accuracy,
                "retention": retention(new.tasks[task].accuracy, found.accuracy),
            }
            for task, found in old.tasks.items()
            if task in new.tasks
        },
    }


def _context(evidence: Evidence, input_tokens: int, output_tokens: int) -> dict[str, Any]:
    pairs = context_pairs(evidence, input_tokens, output_tokens)
    best = _best(evidence, input_tokens, output_tokens)
    return {
        "best": compare(best["parent"], best["child"]),
        "speedup_by_batch": {str(pair.setting.batch_size): pair.speedup for pair in pairs},
    }


def _request_efficiency(evidence: Evidence) -> dict[str, Any]:
    input_tokens, output_tokens = longest_context(evidence)
    points = request_frontier(evidence, input_tokens, output_tokens)
    undominated = pareto_frontier(points)
    rates = {(point.deployment.model, point.deployment.effort): point for point in points}
    by_effort = {
        effort: rates["child", effort].requests_per_s / rates["parent", effort].requests_per_s
        for effort in evidence.efforts
    }
    best = max(evidence.efforts, key=lambda effort: by_effort[effort])
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "relative_to": f"parent at {evidence.efforts[-1]} effort",
        "points": [
            {
                "model": point.deployment.model,
                "effort": point.deployment.effort,
                "relative_rate": point.relative_rate,
                "accuracy": point.accuracy,
                "on_frontier": point in undominated,
            }
            for point in points
        ],
        "child_over_parent": by_effort,
        "best_effort": best,
        "best": by_effort[best],
    }


def _rival(rival: Rival, efforts: Sequence[Effort]) -> dict[str, Any]:
    accuracy = {effort: rival.accuracies(effort) for effort in efforts}
    return {
        "name": rival.name,
        "models": [solution.name for solution in rival.solutions],
        "damage": rival.damage,
        "parameters": fmean(solution.parameters for solution in rival.solutions),
        "experts": fmean(solution.num_experts for solution in rival.solutions),
        "accuracy": {
            effort: {"mean": fmean(found), "min": min(found), "max": max(found)} if found else None
            for effort, found in accuracy.items()
        },
        "mean_accuracy": rival.mean_accuracy,
    }


def headline(summary: Mapping[str, Any]) -> str:
    """What the child is and does, in one sentence."""
    top = list(summary["efforts"])[-1]
    accuracy, efficiency = summary["efforts"][top]["accuracy"], summary["request_efficiency"]
    windows = summary["windowed_layers"]
    speed = summary["throughput"][f"{efficiency['input_tokens']}/{efficiency['output_tokens']}"]["best"]["ratio"]
    kept = "an undefined share" if accuracy["retention"] is None else f"{accuracy['retention']:.1%}"
    return (
        f"The child keeps {summary['experts']['ratio']:.0%} of the experts and {summary['parameters']['ratio']:.0%} "
        f"of the parameters, turns {windows['windowed_in_child']} of {windows['full_in_parent']} full-attention layers "
        f"into windows, keeps {kept} of the parent's accuracy at {top} effort, and generates {speed:.2f}x the tokens "
        f"per second at the longest context measured. In requests answered per second that is at best "
        f"{efficiency['best']:.2f}x, at {efficiency['best_effort']} effort."
    )


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Who wins, child or baseline: by the sum of scores, and by measured accuracy."""
    child, *rest = summary["rivals"]
    others = [rival for rival in rest if not rival["name"].startswith("puzzle")]
    if not others:
        return ["There is no baseline to compare the child with."]
    least = min(others, key=lambda rival: rival["damage"])
    sentences = [
        f"By the sum of scores {_lesser(child, least)}: damage {child['damage']:.4g} "
        f"against {least['damage']:.4g} of {least['name']}, the best baseline under the same limits."
    ]
    evaluated = [rival for rival in others if rival["mean_accuracy"] is not None]
    if not evaluated or child["mean_accuracy"] is None:
        return [*sentences, "No baseline was evaluated, so nothing is known of their accuracy."]
    best = max(evaluated, key=lambda rival: rival["mean_accuracy"])
    points = 100 * (child["mean_accuracy"] - best["mean_accuracy"])
    if abs(points) <= 100 * _TIE:
        outcome = f"{child['name']} and {best['name']} are equal within half a point"
    else:
        outcome = _who(points > 0, child, best)
    sentences.append(
        f"By measured accuracy before any training, the mean over tasks and efforts, {outcome}: "
        f"{child['mean_accuracy']:.1%} against {best['mean_accuracy']:.1%} of {best['name']} ({points:+.1f} points)."
    )
    return sentences


def _lesser(child: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
    """Who has the lesser damage; assemblies that differ by rounding alone are equal."""
    if math.isclose(child["damage"], rival["damage"], rel_tol=1e-9):
        return f"{child['name']} and {rival['name']} are equal"
    return _who(child["damage"] < rival["damage"], child, rival)


def _who(child_wins: bool, child: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    return f"{child['name']} wins" if child_wins else f"the baseline {baseline['name']} wins"

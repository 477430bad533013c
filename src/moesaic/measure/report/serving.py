"""Serving in the report: the sweeps through a server, and the figures that follow from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from moesaic.core.config import CacheDtype, EmulatedCache
from moesaic.core.errors import ArtifactError
from moesaic.measure.benchmark_serving.load_sweep import LoadPoint, Spread, SweptPoint, best_point, pareto_set
from moesaic.measure.efficiency import Deployment, FrontierPoint, frontier_points
from moesaic.measure.report.evidence import Evaluation, Evidence, Setting, common_efforts
from moesaic.measure.report.findings import compare, compare_request_rates, evaluated_qualities, predictions
from moesaic.measure.report.recovery import AVERAGED, FP8, FP8_UNIT, RecoveryEvidence

MODELS = ("parent", "child")
_RECOVERED: Mapping[EmulatedCache, str] = {"bf16": AVERAGED, "fp8_unit": FP8_UNIT, "fp8": FP8}
"""The stage of recovery that evaluated the child as it is served with each KV cache."""


@dataclass(frozen=True)
class ServingEvidence:
    """A ``measurements.json`` of ``benchmark_serving``, and the evidence of its models."""

    search: Evidence
    recovery: RecoveryEvidence | None
    engine: str
    kv_cache: Mapping[str, EmulatedCache]
    """The KV cache of each model."""
    points: Mapping[str, Sequence[SweptPoint]]
    """The points of each model, the same settings in the same order."""
    ratios: Mapping[LoadPoint, Mapping[str, Spread]]
    """The child's figures over the parent's, by point."""
    parent_twice: Mapping[LoadPoint, tuple[float, bool]]
    """By point, the parent's even repeats over its odd ones, and whether the ratio is within the spread."""

    @property
    def searched_parent(self) -> bool:
        """Whether the search began from the parent that is served."""
        return self.search.evaluation_parent.parameters == self.search.parent.parameters

    @property
    def workloads(self) -> list[str]:
        """The names of the workloads, in the order of the config."""
        return list(dict.fromkeys(swept.point.workload for swept in self.points["parent"]))

    @property
    def longest(self) -> str:
        """The workload of the longest prompts."""
        return max(self.points["parent"], key=lambda swept: swept.point.input_tokens).point.workload

    def sweep(self, model: str, workload: str) -> list[SweptPoint]:
        """The points of one model and workload, fewest users first."""
        points = (swept for swept in self.points[model] if swept.point.workload == workload)
        return sorted(points, key=lambda swept: swept.point.concurrency)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The evaluations of the models as served: of the recovered child, if there is one, with its KV cache."""
        if self.recovery is None:
            return {"parent": self.search.evaluation_parent, "child": self.search.evaluation_child}
        fp8 = self.recovery.parent_fp8 if self.kv_cache["parent"] == "fp8" else None
        child = self.recovery.child.stages[_RECOVERED[self.kv_cache["child"]]]
        return {"parent": fp8 or self.recovery.parent, "child": child}


def read_serving(content: Mapping[str, Any], search: Evidence, recovery: RecoveryEvidence | None) -> ServingEvidence:
    """Read the stage's JSON.

    Raises:
        ArtifactError: if something is missing.
    """
    try:
        return ServingEvidence(
            search=search,
            recovery=recovery,
            engine=content["engine"],
            kv_cache=content["kv_cache"],
            points={
                model: [_swept(entry) for entry in content["points"] if entry["model"] == model] for model in MODELS
            },
            ratios={_point(entry): _spreads(entry) for entry in content["ratios"]},
            parent_twice={_point(entry): (entry["ratio"], entry["agrees"]) for entry in content["parent_twice"]},
        )
    except (KeyError, TypeError, ValueError) as broken:
        raise ArtifactError(f"serving given to the report cannot be read ({broken!r}); run its stage again") from broken


def _spreads(entry: Mapping[str, Any]) -> dict[str, Spread]:
    return {name: Spread(**value) for name, value in entry.items() if isinstance(value, Mapping)}


_point = TypeAdapter(LoadPoint).validate_python


def _swept(entry: Mapping[str, Any]) -> SweptPoint:
    return TypeAdapter(SweptPoint).validate_python({**entry, "point": _point(entry)})


def served_frontier(evidence: ServingEvidence) -> list[FrontierPoint]:
    """Accuracy against request rate, ``T_max`` being that of the best concurrency under the longest workload.

    Rates are relative to the parent at its highest effort, with the KV cache it was served with.
    """
    evaluations = evidence.evaluations
    efforts = common_efforts(evaluations.values())
    caches: dict[str, CacheDtype] = {model: "bf16" if evidence.kv_cache[model] == "bf16" else "fp8" for model in MODELS}
    deployed = {Deployment(model, effort, caches[model]): evaluations[model] for model in MODELS for effort in efforts}
    best = {model: best_point(evidence.sweep(model, evidence.longest)) for model in MODELS}
    speeds = {(model, caches[model]): point.tokens_per_s.median for model, point in best.items()}
    return frontier_points(evaluated_qualities(deployed), speeds, Deployment("parent", efforts[-1], caches["parent"]))


def summarize_serving(evidence: ServingEvidence) -> dict[str, Any]:
    """The entry ``serving`` of ``summary.json``."""
    best = {
        workload: {model: best_point(evidence.sweep(model, workload)) for model in MODELS}
        for workload in evidence.workloads
    }
    return {
        "engine": evidence.engine,
        "kv_cache": dict(evidence.kv_cache),
        "tokens_per_s": {
            workload: compare(*(point.tokens_per_s.median for point in points.values()))
            for workload, points in best.items()
        },
        "best": [_configuration(model, point) for points in best.values() for model, point in points.items()],
        "pareto": {
            model: {name: sorted(p.point.concurrency for p in pareto_set(evidence.sweep(model, name))) for name in best}
            for model in MODELS
        },
        "speedups": [_speedup(evidence, point) for point in evidence.ratios],
        "request_efficiency": {"workload": evidence.longest, **compare_request_rates(served_frontier(evidence))},
        "parent_twice": {
            "points": len(evidence.parent_twice),
            "agreeing": sum(agrees for _, agrees in evidence.parent_twice.values()),
            "furthest": max((ratio for ratio, _ in evidence.parent_twice.values()), key=lambda r: abs(math.log(r))),
        },
    }


def _configuration(model: str, swept: SweptPoint) -> dict[str, Any]:
    rates = ("tokens_per_s", "requests_per_s", "tokens_per_s_per_user")
    return {
        "model": model,
        **asdict(swept.point),
        **{rate: getattr(swept, rate).median for rate in rates},
        "ttft_ms": {key: spread.median for key, spread in swept.ttft_ms.items()},
        "request_ms": {key: spread.median for key, spread in swept.request_ms.items()},
    }


def _speedup(evidence: ServingEvidence, point: LoadPoint) -> dict[str, Any]:
    """Child over parent in throughput: through the server, timed in process, and by the cost table, where they are.

    With several rounds the cost table's parent is an earlier round's child, and says nothing of this ratio.
    """
    setting = Setting(point.input_tokens, point.output_tokens, point.concurrency)
    timed = {pair.setting: pair.speedup for pair in evidence.search.pairs}
    workloads = {
        Setting(load.input_tokens, load.output_tokens, load.concurrency): load.name
        for load in evidence.search.costs.workloads
    }
    predicted = {entry.workload: entry.predicted["throughput"] for entry in predictions(evidence.search)}
    return {
        **asdict(point),
        "served": asdict(evidence.ratios[point]["tokens_per_s"]),
        "in_process": timed.get(setting),
        "predicted": predicted.get(workloads.get(setting, "")) if evidence.searched_parent else None,
    }

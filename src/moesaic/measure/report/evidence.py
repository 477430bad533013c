"""The evidence of a report: the outputs of earlier stages, parsed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moesaic.core.config import CacheDtype, Effort, EmulatedCache
from moesaic.core.errors import ArtifactError
from moesaic.costs.block_costs import CostTable
from moesaic.measure.benchmark_serving.load_sweep import Spread
from moesaic.measure.evaluate.stage import Split
from moesaic.measure.paired import Verdicts
from moesaic.models.architecture import Architecture, Block

EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")


@dataclass(frozen=True)
class Candidate:
    """A candidate of ``architecture.json``: its blocks, its damage and the costs that the cost table predicts."""

    name: str
    architecture: Architecture
    damage: float | None
    """The sum of its blocks' scores; None if it keeps other experts than those that were scored."""
    measured: float | None
    """The damage of the whole assembly; None if it was not run."""
    parameters: int
    num_experts: int
    memory_mib: Mapping[str, float]
    throughput_tokens_per_s: Mapping[str, float]
    breaks: Sequence[str]
    """The limits of the search that it exceeds, in words."""


@dataclass(frozen=True)
class Result:
    """Accuracy and length of the replies to one task at one effort, or their mean over all tasks."""

    accuracy: float
    tokens_per_request: float
    truncated: float


@dataclass(frozen=True)
class TaskResult(Result):
    """One task at one effort."""

    solved: Mapping[str, float]
    """By problem, the share of correct replies."""

    @property
    def verdicts(self) -> Verdicts:
        """Of this task alone."""
        return {"": self.solved}


@dataclass(frozen=True)
class EffortResult(Result):
    """The suite at one effort, and its tasks by name."""

    tasks: Mapping[str, TaskResult]

    @property
    def verdicts(self) -> Verdicts:
        """Of all tasks."""
        return {name: task.solved for name, task in self.tasks.items()}

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, over the choice of problems of the same tasks."""
        variance = sum(task.accuracy * (1 - task.accuracy) / len(task.solved) for task in self.tasks.values())
        return math.sqrt(variance) / len(self.tasks)


@dataclass(frozen=True)
class ProblemSet:
    """The problems that an evaluation asked."""

    split: Split
    count: int
    digest: str


@dataclass(frozen=True)
class Evaluation:
    """An ``evaluation.json``."""

    name: str
    parameters: int
    problems: ProblemSet
    efforts: Mapping[Effort, EffortResult]
    kv_cache: EmulatedCache | None = None
    """The emulated format of the KV cache; None if nothing was emulated."""


@dataclass(frozen=True, order=True)
class Setting:
    """Context and batch size of a measurement."""

    input_tokens: int
    output_tokens: int
    batch_size: int

    @property
    def context(self) -> tuple[int, int]:
        """The input and output tokens."""
        return self.input_tokens, self.output_tokens


@dataclass(frozen=True)
class Speed:
    """The measured speed of one model at one setting."""

    tokens_per_s: Spread
    prefill_ms: Spread
    decode_ms: Spread


@dataclass(frozen=True)
class Pair:
    """The speed of parent and child at one setting."""

    setting: Setting
    parent: Speed
    child: Speed

    @property
    def speedup(self) -> float:
        """The child's output-token throughput over the parent's, by medians."""
        return self.child.tokens_per_s.median / self.parent.tokens_per_s.median


@dataclass(frozen=True)
class Damage:
    """The damage of replacing one block, on short and on long context, in the metric of the search."""

    layer: int
    block: Block
    short: float
    long: float


@dataclass(frozen=True)
class MeasuredAssembly:
    """An assembly that the search ran whole, and what was expected of it."""

    sum: float
    """The sum of its blocks' scores."""
    expected: float
    """By that sum and the assemblies measured before."""
    measured: float


@dataclass(frozen=True)
class Evidence:
    """The evidence of the search and its child."""

    ranking: Sequence[Sequence[int]]
    """Per layer the experts, most important first."""
    metric: str
    damages: Sequence[Damage]
    costs: CostTable
    parent: Candidate
    candidates: Mapping[str, Candidate]
    skipped: Mapping[str, str]
    swept: str
    frontier: Sequence[Candidate]
    refinement: Sequence[MeasuredAssembly]
    """In the order in which they were run."""
    evaluation_parent: Evaluation
    evaluation_child: Evaluation
    baselines: Sequence[Evaluation]
    hardware: Mapping[str, Any]
    pairs: Sequence[Pair]
    pairs_fp8: Sequence[Pair]
    """Pairs measured with an FP8 cache; empty if there are none."""

    @property
    def child(self) -> Candidate:
        """The candidate that became the child."""
        return self.candidates[self.evaluation_child.name]

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The evaluations of parent and child, by role."""
        return {"parent": self.evaluation_parent, "child": self.evaluation_child}

    @property
    def efforts(self) -> list[Effort]:
        """The efforts at which all models were evaluated, lowest first."""
        return common_efforts([*self.evaluations.values(), *self.baselines])


def common_efforts(evaluations: Iterable[Evaluation]) -> list[Effort]:
    """The efforts that all evaluations have, lowest first."""
    evaluations = list(evaluations)
    return [effort for effort in EFFORTS if all(effort in evaluation.efforts for evaluation in evaluations)]


def check_problems(evaluations: Iterable[Evaluation]) -> None:
    """Raise ArtifactError unless all were asked the same problems."""
    first, *others = evaluations
    for other in others:
        if other.problems != first.problems:
            raise ArtifactError(
                f"the evaluation of {other.name!r} asked {other.problems}, that of {first.name!r} {first.problems}; "
                "only figures on the same problems compare: evaluate all with the same config and data"
            )


def read_evidence(
    *,
    ranking: Mapping[str, Any],
    scores: Mapping[str, Any],
    costs: str,
    architecture: Mapping[str, Any],
    evaluation_parent: Mapping[str, Any],
    evaluation_child: Mapping[str, Any],
    baselines: Sequence[Mapping[str, Any]],
    measurements: Mapping[str, Any],
) -> Evidence:
    """Read the stages' JSON, and check that it fits together.

    Raises:
        ArtifactError: if something is missing, or the child evaluated is none of the candidates.
    """
    try:
        evidence = Evidence(
            ranking=[layer["order"] for layer in ranking["layers"]],
            metric=scores["metric"],
            damages=[_read_damage(row, scores["metric"]) for row in scores["rows"]],
            costs=CostTable.from_json(costs),
            parent=_read_candidate("parent", architecture["parent"]),
            candidates={name: _read_candidate(name, entry) for name, entry in architecture["candidates"].items()},
            skipped=architecture.get("skipped", {}),
            swept=architecture["swept"],
            frontier=[_read_candidate("frontier", entry) for entry in architecture["frontier"]],
            refinement=[
                MeasuredAssembly(row["sum"], row["expected"], row["measured"])
                for row in architecture["refinement"]["evaluations"]
            ],
            evaluation_parent=read_evaluation(evaluation_parent),
            evaluation_child=read_evaluation(evaluation_child),
            baselines=[read_evaluation(entry) for entry in baselines],
            hardware=measurements["hardware"],
            pairs=read_pairs(measurements["points"]),
            pairs_fp8=read_pairs(measurements["points"], "fp8"),
        )
    except (KeyError, TypeError, ValidationError) as broken:
        raise ArtifactError(f"an input of the report cannot be read ({broken!r}); run its stage again") from broken
    _check(evidence)
    return evidence


def _check(evidence: Evidence) -> None:
    for evaluation in (evidence.evaluation_child, *evidence.baselines):
        if evaluation.name not in evidence.candidates:
            known = ", ".join(evidence.candidates)
            raise ArtifactError(f"the evaluation of {evaluation.name!r} is of none of the candidates found: {known}")
    check_problems([*evidence.evaluations.values(), *evidence.baselines])
    if not evidence.efforts:
        raise ArtifactError("the models were evaluated at no common effort; evaluate all with the same config")
    if not evidence.pairs:
        raise ArtifactError("measurements.json holds no point of both models; run benchmark again")


def _read_candidate(name: str, entry: Mapping[str, Any]) -> Candidate:
    architecture = Architecture.of(Block.from_config(block) for block in entry["blocks"])
    figures = ("damage", "parameters", "num_experts", "memory_mib", "throughput_tokens_per_s")
    return Candidate(
        name,
        architecture,
        measured=entry.get("measured"),
        breaks=entry["breaks"],
        **{figure: entry[figure] for figure in figures},
    )


def _read_damage(row: Mapping[str, Any], metric: str) -> Damage:
    return Damage(row["layer"], Block.from_config(row), row["short"][metric], row["long"][metric])


_EVALUATION, _SETTING, _SPEED = TypeAdapter(Evaluation), TypeAdapter(Setting), TypeAdapter(Speed)


def read_evaluation(content: Mapping[str, Any]) -> Evaluation:
    """Parse the content of an ``evaluation.json``."""
    return _EVALUATION.validate_python(content)


def read_pairs(points: Sequence[Mapping[str, Any]], kv_cache: CacheDtype = "bf16") -> list[Pair]:
    """The settings at which both models were measured with this KV cache; points that do not say are of BF16."""
    speeds: dict[Setting, dict[str, Speed]] = {}
    for point in points:
        if point.get("kv_cache", "bf16") == kv_cache:
            speeds.setdefault(_SETTING.validate_python(point), {})[point["model"]] = _SPEED.validate_python(point)
    return [Pair(setting, models["parent"], models["child"]) for setting, models in sorted(speeds.items())]

"""What a report says of recovery is made of: the child's evaluations after every stage, and the same of a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.configs import Effort
from moesaic.errors import ArtifactError
from moesaic.report.evidence import EFFORTS, Evaluation, Evidence, Pair, read_evaluation, read_pairs

PRUNED, DISTILLED, AVERAGED, FP8_UNIT, FP8 = "pruned", "distilled", "averaged", "fp8_unit", "fp8"
_NEEDED = (PRUNED, DISTILLED, AVERAGED, FP8_UNIT, FP8)
HELD_OUT = "held_out_"
"""A training curve's ``held_out_x`` is ``x`` on traces that were never trained on."""


@dataclass(frozen=True)
class Recovery:
    """A ``recovery.json``."""

    candidate: str
    stages: Mapping[str, Evaluation]
    """In their order; the two of the FP8 cache are of the averaged weights."""
    traces: Mapping[Effort, Mapping[str, float]]
    """What the parent's own replies to the training prompts were, per effort."""
    curve: Sequence[Mapping[str, float]]
    """The distillation's steps: numbers by name."""

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
            name: {"training": self._points(name), "held out": self._points(HELD_OUT + name)}
            for name in computed
            if HELD_OUT + name in computed
        }

    def _points(self, name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in self.curve if name in row]


@dataclass(frozen=True)
class RecoveryEvidence:
    """The recovery of the child whose search the rest of the evidence is about."""

    search: Evidence
    child: Recovery
    baseline: Recovery | None
    """Another child of the same budget that got the same recovery."""
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
        """The child's, and the baseline's if there is one."""
        return [self.child] if self.baseline is None else [self.child, self.baseline]

    @property
    def efforts(self) -> list[Effort]:
        """The efforts at which everything was evaluated, lowest first."""
        evaluations = [self.parent, *(found for one in self.recoveries for found in one.stages.values())]
        if self.parent_fp8:
            evaluations.append(self.parent_fp8)
        return [effort for effort in EFFORTS if all(effort in found.efforts for found in evaluations)]

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
    except (KeyError, TypeError) as broken:
        raise ArtifactError(f"a recovery given to the report cannot be read ({broken!r}); run its stage again") from (
            broken
        )
    _check(evidence)
    return evidence


def _read(entry: Mapping[str, Any]) -> Recovery:
    stages = {found["stage"]: read_evaluation(found["evaluation"]) for found in entry["stages"]}
    if missing := [stage for stage in _NEEDED if stage not in stages]:
        raise ArtifactError(f"the recovery of {entry['candidate']!r} lacks {missing}; run gather_recovery again")
    return Recovery(entry["candidate"], stages, entry["traces"]["efforts"], entry["curve"])


def _check(evidence: RecoveryEvidence) -> None:
    found, wanted = evidence.child.candidate, evidence.search.child.name
    if found != wanted:
        raise ArtifactError(f"the recovery given is of {found!r}, but the child evaluated is {wanted!r}; give its own")
    if evidence.baseline and evidence.baseline.candidate == found:
        raise ArtifactError(f"recovery_baseline is of {found!r} itself; give that of another candidate")
    if not evidence.efforts:
        raise ArtifactError("recovery and parent were evaluated at no common effort; evaluate all with the same config")

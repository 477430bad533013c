"""The gate of the model registry: what a child must show before it becomes the champion (paper A, its first figure).

    accuracy_points(effort)    = accuracy(child) - accuracy(parent), on the same problems, in points
    kv_accuracy_points(effort) = accuracy(KV in FP8, calibrated scales) - accuracy(KV in BF16), of the child
    request_efficiency(effort) = requests/s of the child / requests/s of the parent, at equal effort: through a server,
                                 as deployed, where the report has that; else in process, KV cache in BF16
    outside(task)              = accuracy(child) - accuracy(parent) in points, by a harness outside this project

All but the last are the report's figures. Accuracies are asked whether they are *not inferior*: the lower end of the
95 % interval (``moesaic.measure.paired``; unpaired where an outside harness gives only means) must lie above minus a
margin. So noise does not refuse a child that is as good as its parent, if there are problems enough for the margin, and
does not promote one that is worse by more.

Three lines more ask whether the figures can be trusted: what is known of the exported bundle, by its files or by an
engine that loaded it; that every input is known by digest; and that report and bundle are of this very child. The paper
has no such gate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.measure.paired import Difference
from moesaic.platform.promote.stage import PromoteConfig

_NOT_MEASURED = "not measured"
_DIFFERENCES = TypeAdapter(dict[str, Difference])
_Figure = TypeVar("_Figure")


@dataclass(frozen=True)
class Figures:
    """The report's figures of a child; a figure that was not measured is absent."""

    accuracy: Mapping[str, Difference]
    """Of the child to the parent, by effort."""
    request_efficiency: Mapping[str, float]
    """Request rate of the child over the parent's, by effort."""
    kv_accuracy: Mapping[str, Difference]
    """Of the child's FP8 cache to its BF16 cache, by effort."""
    outside: Mapping[str, Difference] = field(default_factory=dict)
    """Of the child to the parent, by the task of a harness outside this project."""


@dataclass(frozen=True)
class Provenance:
    """How much of the history of a child and its evidence is recorded."""

    known: int
    """The number of inputs, over all stages, that are in the store with their records."""
    unknown: tuple[str, ...]
    """Name and digest of each other input."""
    evidence_is_its_own: bool
    """Whether the report, and the bundle if there is one, were made from this child."""


@dataclass(frozen=True)
class Line:
    """One condition of the gate."""

    name: str
    figure: float | str
    asked: str
    met: bool
    difference: Difference | None = None
    """With its interval, where the figure is one."""

    @property
    def shown(self) -> str:
        """The figure as text; where it has an interval, with that and the number of problems compared one by one."""
        if self.difference is not None:
            how = f"n = {self.difference.problems}" if self.difference.paired else "unpaired"
            return f"{self.difference}, {how}"
        return self.figure if isinstance(self.figure, str) else f"{self.figure:.4g}"


def read_figures(summary: Mapping[str, Any]) -> Figures:
    """The figures in a report's ``summary.json``: of the recovered child, or of the pruned one if none was recovered.

    Raises:
        ArtifactError: if it is not such a summary.
    """
    try:
        recovery = summary.get("recovery")
        if recovery is None:
            differences = {effort: entry["accuracy"]["difference"] for effort, entry in summary["efforts"].items()}
            rates = summary["request_efficiency"]["child_over_parent"]
            return Figures(_DIFFERENCES.validate_python(differences), rates, {})
        rows = [row for row in recovery["kv_cache"] if (row["model"], row["kv_cache"]) == ("child", "fp8")]
        changes = {effort: entry["change"] for row in rows for effort, entry in row["efforts"].items()}
        served = summary.get("serving")
        in_process = recovery["request_efficiency"]["equal_effort"]
        rates = in_process if served is None else served["request_efficiency"]["child_over_parent"]
        accuracy, kv_accuracy = (_DIFFERENCES.validate_python(found) for found in (recovery["differences"], changes))
        return Figures(accuracy, rates, kv_accuracy)
    except (AttributeError, KeyError, TypeError, ValidationError) as broken:
        raise ArtifactError(f"summary.json of the report cannot be read ({broken!r}); run report again") from broken


def judge(config: PromoteConfig, figures: Figures, bundle: Verdict | None, provenance: Provenance) -> list[Line]:
    """Every line of the gate; the child may become champion if all are met.

    Args:
        config: the margins and thresholds; what it does not ask for has no line.
        figures: of the report.
        bundle: what is known of the exported bundle; None if there is none.
        provenance: of child and report.
    """
    lines = [
        *_by_effort("accuracy_points", _not_inferior, figures.accuracy, config.margin_points),
        *_by_effort("request_efficiency", _at_least, figures.request_efficiency, config.min_request_efficiency),
        *_by_effort("kv_accuracy_points", _not_inferior, figures.kv_accuracy, config.kv_margin_points),
        *(
            _not_inferior(f"outside.{task}", figures.outside.get(task), margin)
            for task, margin in config.outside_margin_points.items()
        ),
    ]
    if config.require_export:
        figure = "no bundle" if bundle is None else bundle.words
        verified = bundle is not None and (bundle.loaded_by is not None or not config.require_engine)
        asked = "verified by an engine" if config.require_engine else "no check failed"
        lines.append(Line("export_checked", figure, asked, bundle is not None and bundle.passed and verified))
    return [*lines, *_provenance_lines(provenance)]


def is_met(lines: Sequence[Line]) -> bool:
    """Whether every line holds."""
    return all(line.met for line in lines)


def gate_table(lines: Sequence[Line]) -> Table:
    """The lines as a table for a terminal or a log."""
    table = Table("line", "figure", "asked", "", title="Gate")
    for line in lines:
        table.add_row(line.name, line.shown, line.asked, "met" if line.met else "NOT MET")
    return table


def _provenance_lines(provenance: Provenance) -> list[Line]:
    every = provenance.known + len(provenance.unknown)
    unknown = f"; unknown: {', '.join(provenance.unknown)}" if provenance.unknown else ""
    complete = every > 0 and not provenance.unknown
    own = provenance.evidence_is_its_own
    return [
        Line("lineage_complete", f"{provenance.known} of {every} inputs{unknown}", "all", complete),
        Line("evidence_of_this_child", "yes" if own else "no", "yes", own),
    ]


def _by_effort(
    name: str,
    line: Callable[[str, _Figure | None, float], Line],
    figures: Mapping[str, _Figure],
    asked: Mapping[Effort, float],
) -> list[Line]:
    efforts: tuple[Effort, ...] = get_args(Effort)
    return [line(f"{name}.{effort}", figures.get(effort), asked[effort]) for effort in efforts if effort in asked]


def _not_inferior(name: str, difference: Difference | None, margin_points: float) -> Line:
    asked = f"interval above -{margin_points:g}"
    if difference is None:
        return Line(name, _NOT_MEASURED, asked, False)
    return Line(name, difference.points, asked, difference.low_points > -margin_points, difference)


def _at_least(name: str, figure: float | None, least: float) -> Line:
    if figure is None:
        return Line(name, _NOT_MEASURED, f">= {least:g}", False)
    return Line(name, figure, f">= {least:g}", figure >= least)

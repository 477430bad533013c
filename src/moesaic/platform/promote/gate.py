"""The gate of the model registry: what a child must show before it becomes the champion (paper A, its first figure).

    retention(effort)          = accuracy(child) / accuracy(parent)
    request_efficiency(effort) = requests/s of the child / requests/s of the parent, at equal effort: through a server,
                                 as deployed, where the report has that; else in process, KV cache in BF16
    kv_accuracy_loss           = largest, over efforts, of accuracy(KV in BF16) - accuracy(KV in FP8), calibrated scales

All three are the report's figures. Three lines more ask whether they can be trusted: what is known of the exported
bundle, by its files or by an engine that loaded it; that every input is known by digest; and that report and bundle are
of this very child. The paper has no such gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.table import Table

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.platform.promote.stage import PromoteConfig

_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Figures:
    """The report's figures of a child; a figure that was not measured is absent or None."""

    retention: Mapping[str, float | None]
    """Accuracy of the child over the parent's, by effort."""
    request_efficiency: Mapping[str, float]
    """Request rate of the child over the parent's, by effort."""
    kv_accuracy_loss: float | None


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


def read_figures(summary: Mapping[str, Any]) -> Figures:
    """The figures in a report's ``summary.json``: of the recovered child, or of the pruned one if none was recovered.

    Raises:
        ArtifactError: if it is not such a summary.
    """
    try:
        recovery = summary.get("recovery")
        if recovery is None:
            retained = {effort: entry["accuracy"]["retention"] for effort, entry in summary["efforts"].items()}
            return Figures(retained, summary["request_efficiency"]["child_over_parent"], None)
        rows = [row for row in recovery["kv_cache"] if (row["model"], row["kv_cache"]) == ("child", "fp8")]
        losses = [-entry["change"] for row in rows for entry in row["efforts"].values()]
        served = summary.get("serving")
        in_process = recovery["request_efficiency"]["equal_effort"]
        rates = in_process if served is None else served["request_efficiency"]["child_over_parent"]
        return Figures(recovery["retention"], rates, max(losses, default=None))
    except (AttributeError, KeyError, TypeError) as broken:
        raise ArtifactError(f"summary.json of the report cannot be read ({broken!r}); run report again") from broken


def judge(config: PromoteConfig, figures: Figures, bundle: Verdict | None, provenance: Provenance) -> list[Line]:
    """Every line of the gate; the child may become champion if all are met.

    Args:
        config: the thresholds; what it does not ask for has no line.
        figures: of the report.
        bundle: what is known of the exported bundle; None if there is none.
        provenance: of child and report.
    """
    lines = _by_effort("retention", figures.retention, config.min_retention)
    lines += _by_effort("request_efficiency", figures.request_efficiency, config.min_request_efficiency)
    if config.max_kv_accuracy_loss is not None:
        lines.append(_at_most("kv_accuracy_loss", figures.kv_accuracy_loss, config.max_kv_accuracy_loss))
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
        table.add_row(line.name, shown(line.figure), line.asked, "met" if line.met else "NOT MET")
    return table


def shown(figure: float | str) -> str:
    """A figure as text, for the table."""
    return figure if isinstance(figure, str) else f"{figure:.4g}"


def _provenance_lines(provenance: Provenance) -> list[Line]:
    every = provenance.known + len(provenance.unknown)
    unknown = f"; unknown: {', '.join(provenance.unknown)}" if provenance.unknown else ""
    complete = every > 0 and not provenance.unknown
    own = provenance.evidence_is_its_own
    return [
        Line("lineage_complete", f"{provenance.known} of {every} inputs{unknown}", "all", complete),
        Line("evidence_of_this_child", "yes" if own else "no", "yes", own),
    ]


def _by_effort(name: str, figures: Mapping[str, float | None], least: Mapping[Effort, float]) -> list[Line]:
    efforts: tuple[Effort, ...] = get_args(Effort)
    asked = (effort for effort in efforts if effort in least)
    return [_at_least(f"{name}.{effort}", figures.get(effort), least[effort]) for effort in asked]


def _at_least(name: str, figure: float | None, least: float) -> Line:
    return Line(name, _or_words(figure), f">= {least:g}", figure is not None and figure >= least)


def _at_most(name: str, figure: float | None, most: float) -> Line:
    return Line(name, _or_words(figure), f"<= {most:g}", figure is not None and figure <= most)


def _or_words(figure: float | None) -> float | str:
    return _NOT_MEASURED if figure is None else figure

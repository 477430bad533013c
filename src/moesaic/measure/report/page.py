"""The page: what was computed put into the templates, and its pictures drawn, everything inside one HTML file."""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from moesaic.core.errors import ArtifactError
from moesaic.measure.report import tables
from moesaic.measure.report.block_figures import draw_architecture, draw_damage, draw_importance
from moesaic.measure.report.drawing import to_png
from moesaic.measure.report.evidence import Evidence
from moesaic.measure.report.recovery import RecoveryEvidence
from moesaic.measure.report.recovery_figures import (
    draw_contributions,
    draw_distillation,
    draw_recovery_frontier,
    draw_retention,
    draw_tokens,
)
from moesaic.measure.report.result_figures import (
    draw_efforts,
    draw_predictions,
    draw_refinement,
    draw_request_frontier,
    draw_search,
    draw_served_frontier,
    draw_served_latency,
    draw_served_throughput,
    draw_throughput,
)
from moesaic.measure.report.serving import ServingEvidence

_SEARCH: Mapping[str, Callable[[Evidence], Figure]] = {
    "architecture": draw_architecture,
    "importance": draw_importance,
    "damage": draw_damage,
    "search": draw_search,
    "refinement": draw_refinement,
    "throughput": draw_throughput,
    "predictions": draw_predictions,
}
_PRUNED: Mapping[str, Callable[[Evidence], Figure]] = {"frontier": draw_request_frontier, "efforts": draw_efforts}
"""Of the pruned child, where there is no recovered one."""
_RECOVERY: Mapping[str, Callable[[RecoveryEvidence], Figure]] = {
    "frontier": draw_recovery_frontier,
    "contributions": draw_contributions,
    "retention": draw_retention,
    "tokens": draw_tokens,
    "distillation": draw_distillation,
}
_SERVING: Mapping[str, Callable[[ServingEvidence], Figure]] = {
    "served_frontier": draw_served_frontier,
    "served_throughput": draw_served_throughput,
    "served_latency": draw_served_latency,
}
_FILTERS: tuple[Callable[..., str], ...] = (
    *(tables.number, tables.percent, tables.tenths, tables.points, tables.ratio, tables.tokens),
    tables.stage_name,
)
"""How the templates write values; each by its own name."""
_OUTSIDE_HERE = "<!-- results of outside harnesses -->"
"""Where the page has room for them; they come later, when the child has been served."""
_LOOK = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "legend.frameon": False}


def draw_pictures(
    evidence: Evidence, recovery: RecoveryEvidence | None = None, serving: ServingEvidence | None = None
) -> dict[str, bytes]:
    """All pictures by name, as PNG."""
    search = _SEARCH if recovery else {**_PRUNED, **_SEARCH}
    with rc_context(_LOOK):
        pictures = {name: to_png(draw(evidence)) for name, draw in search.items()}
        if recovery:
            pictures |= {name: to_png(draw(recovery)) for name, draw in _RECOVERY.items()}
        if serving:
            pictures |= {name: to_png(draw(serving)) for name, draw in _SERVING.items()}
    return pictures


def render_page(title: str, evidence: Evidence, summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page as HTML that needs nothing beside it."""
    recovery = summary.get("recovery")
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            title=title,
            summary=summary,
            recovery=recovery,
            serving=summary.get("serving"),
            comparison=tables.comparison_rows(summary),
            stages=tables.stage_rows(recovery) if recovery else [],
            pairs=evidence.pairs,
            sources={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()},
        )
    )


def add_outside(page: str, outside: Mapping[str, Any]) -> str:
    """The page with the results of harnesses outside this project, see ``moesaic.measure.outside``.

    Raises:
        ArtifactError: if the page has no room for them.
    """
    if page.count(_OUTSIDE_HERE) != 1:
        raise ArtifactError("report.html is of another version, without room for outside results; run report again")
    section = _templates().get_template("outside.html.j2")
    return page.replace(_OUTSIDE_HERE, section.render(outside=outside, rows=tables.outside_rows(outside)))


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {write.__name__: write for write in _FILTERS}
    return environment

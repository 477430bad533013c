"""The page itself: pictures and tables put into the template, everything inside one HTML file."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from moesaic.report.block_figures import draw_architecture, draw_damage, draw_importance
from moesaic.report.drawing import to_png
from moesaic.report.evidence import Evidence
from moesaic.report.findings import headline, verdicts
from moesaic.report.result_figures import (
    draw_efforts,
    draw_predictions,
    draw_request_frontier,
    draw_search,
    draw_throughput,
)


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its file name without ending, its heading and what it shows."""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


_PICTURES: tuple[tuple[str, Callable[[Evidence], Figure], str, str], ...] = (
    (
        "frontier",
        draw_request_frontier,
        "Accuracy against requests per second",
        "Measured. A model's request rate is its best output-token throughput at the longest context measured, divided "
        "by the mean tokens it generates per request of the test suite. Up and to the right is better.",
    ),
    (
        "efforts",
        draw_efforts,
        "Accuracy and tokens per effort",
        "Measured on the test problems. A truncated reply counts as wrong.",
    ),
    (
        "architecture",
        draw_architecture,
        "The child's blocks",
        "Experts kept per layer; colours are attention windows in tokens, a white mark says that the layer was full "
        "attention in the parent. Dotted: the parent's experts.",
    ),
    (
        "importance",
        draw_importance,
        "Importance of every expert",
        "Rank of each expert within its layer, dark is important. Outlined experts are kept, crossed ones removed.",
    ),
    (
        "damage",
        draw_damage,
        "Damage of replacing one block",
        "Measured: one block of the parent is replaced, the rest runs unchanged. Logarithmic colours; outlined are the "
        "child's choices, grey blocks were not on offer in that layer. The parent's own block does no damage.",
    ),
    (
        "search",
        draw_search,
        "What the search found",
        "Damage is the sum of the scores above, so a prediction, and so is speed, the sum of the cost table's rows. "
        "The line is the least damage at each speed, all other limits kept; baselines keep the child's limits.",
    ),
    (
        "throughput",
        draw_throughput,
        "Throughput against batch size",
        "Measured on this device: output tokens over the whole time, prefill included. Lines are medians, bands run "
        "from the slowest to the fastest repeat; repeats alternate between the models. Labels: child over parent.",
    ),
    (
        "predictions",
        draw_predictions,
        "Predicted and measured speed-up",
        "Child over parent under the search's own workloads: by the cost table, and timed. Medians of the repeats.",
    ),
)


def draw_pictures(evidence: Evidence) -> list[Picture]:
    """All pictures, in the page's order."""
    look = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "legend.frameon": False}
    with rc_context(look):
        return [Picture(name, title, caption, to_png(draw(evidence))) for name, draw, title, caption in _PICTURES]


def render_page(title: str, evidence: Evidence, summary: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page as HTML that needs nothing beside it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "ratio": _ratio, "number": _number}
    template = environment.from_string(files("moesaic.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        summary=summary,
        headline=headline(summary),
        verdicts=verdicts(summary),
        pictures=pictures,
        evidence=evidence,
    )


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f} %"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _number(value: float) -> str:
    """Three significant digits at least; whole numbers in full, thousands apart."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"

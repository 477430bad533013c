"""The page itself: pictures and tables put into the template, everything inside one HTML file."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from moesaic.report.block_figures import draw_architecture, draw_damage, draw_importance
from moesaic.report.drawing import to_png
from moesaic.report.evidence import Evidence
from moesaic.report.findings import headline, verdicts
from moesaic.report.recovery import RecoveryEvidence
from moesaic.report.recovery_figures import (
    draw_contributions,
    draw_distillation,
    draw_recovery_frontier,
    draw_retention,
    draw_tokens,
    stage_name,
)
from moesaic.report.recovery_sentences import kv_name, recovery_findings, recovery_headline
from moesaic.report.result_figures import (
    draw_efforts,
    draw_predictions,
    draw_request_frontier,
    draw_search,
    draw_throughput,
)
from moesaic.report.serving import ServingEvidence
from moesaic.report.serving_figures import draw_served_frontier, draw_served_latency, draw_served_throughput


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


_RECOVERY_PICTURES: tuple[tuple[str, Callable[[RecoveryEvidence], Figure], str, str], ...] = (
    (
        "frontier",
        draw_recovery_frontier,
        "Accuracy against requests per second",
        "A model's request rate is its best output-token throughput at the longest context measured, divided by the "
        "mean tokens it generates per request of the test suite. Up and to the right is better. The child's "
        "checkpoints share its architecture, and so its measured throughput; a baseline's is by its ratio to the "
        "parent, timed side by side. Dashed lines and open markers: KV cache in BF16; solid and filled: in FP8 with "
        "calibrated scales.",
    ),
    (
        "contributions",
        draw_contributions,
        "What each stage contributed",
        "Measured accuracy after every stage. The line runs from the pruned child through distillation and the average "
        "of the policies to the calibrated FP8 cache; diamonds lie beside that way: each policy is trained from the "
        "distilled child, and FP8 with unit scales is the same child without calibration. Every panel has its own "
        "scale; bars are one standard error, by the choice of test problems.",
    ),
    (
        "retention",
        draw_retention,
        "Accuracy kept, per task and stage",
        "The child's accuracy over the parent's in percent; in brackets after each task's name the parent's accuracy. "
        "Ratios in brackets are to a parent that solves less than one problem in ten, and say little.",
    ),
    (
        "tokens",
        draw_tokens,
        "Generated tokens per request",
        "Means over the test suite. Left: parent, pruned child, recovered child. Right: the child after every stage.",
    ),
    (
        "distillation",
        draw_distillation,
        "The distillation",
        "Against the parent, on its own answers: those trained on, and those held out. Means over response tokens.",
    ),
)
_SERVING_PICTURES: tuple[tuple[str, Callable[[ServingEvidence], Figure], str, str], ...] = (
    (
        "served_frontier",
        draw_served_frontier,
        "Accuracy against requests per second, as served",
        "Measured through the server: a model's request rate is the output-token throughput of its best configuration "
        "under the workload of the longest prompts, divided by the mean tokens it generates per request of the test "
        "suite. Up and to the right is better.",
    ),
    (
        "served_throughput",
        draw_served_throughput,
        "Throughput against users",
        "Measured through the server by a client that keeps one request of every user in flight. Lines are medians, "
        "bands run from the slowest to the fastest repeat; every repeat has a server of its own, and repeats "
        "alternate between the models. Labels: child over parent.",
    ),
    (
        "served_latency",
        draw_served_latency,
        "System throughput against the speed of one user",
        "The same runs; numbers are users. One user's speed is the reciprocal of the mean time between tokens, once a "
        "reply has begun. Filled markers are the Pareto set: no other point of the model is better in one without "
        "being worse in the other. Bars run over the repeats.",
    ),
)
_SUPERSEDED = ("frontier", "efforts")
"""Pictures of the pruned child that recovery's say more than."""
_NOT_TIMED = " Speed was timed with the cache in BF16 only, and is taken to be the same in FP8: the lines differ in "
_NOT_TIMED += "accuracy and in length of the answers alone."


def draw_pictures(
    evidence: Evidence, recovery: RecoveryEvidence | None = None, serving: ServingEvidence | None = None
) -> list[Picture]:
    """All pictures, in the page's order: recovery first, if there was one, and serving last."""
    look = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "legend.frameon": False}
    with rc_context(look):
        search = [Picture(name, title, caption, to_png(draw(evidence))) for name, draw, title, caption in _PICTURES]
        if serving is not None:
            search += [
                Picture(name, title, caption, to_png(draw(serving))) for name, draw, title, caption in _SERVING_PICTURES
            ]
        if recovery is None:
            return search
        note = {"frontier": "" if recovery.fp8_was_timed else _NOT_TIMED}
        recovered = [
            Picture(name, title, caption + note.get(name, ""), to_png(draw(recovery)))
            for name, draw, title, caption in _RECOVERY_PICTURES
        ]
    return recovered + [picture for picture in search if picture.name not in _SUPERSEDED]


def render_page(title: str, evidence: Evidence, summary: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page as HTML that needs nothing beside it."""
    environment = Environment(
        loader=PackageLoader("moesaic", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _FILTERS
    recovery = summary.get("recovery")
    return environment.get_template("page.html.j2").render(
        title=title,
        summary=summary,
        recovery=recovery,
        headline=recovery_headline(summary) if recovery else headline(summary),
        recovery_findings=recovery_findings(recovery) if recovery else [],
        verdicts=verdicts(summary),
        pictures=pictures,
        evidence=evidence,
    )


def _tenths(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def _tokens(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f} %"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _number(value: float) -> str:
    """Three significant digits at least; whole numbers in full, thousands apart."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


_FILTERS = {
    "percent": _percent,
    "ratio": _ratio,
    "number": _number,
    "tokens": _tokens,
    "points": _points,
    "tenths": _tenths,
    "stage": stage_name,
    "kv": kv_name,
}

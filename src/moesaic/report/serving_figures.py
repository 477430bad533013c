"""Pictures of serving: throughput against users (paper A, figure 4), and what one user sees of it (figure 5)."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.load_sweep import Spread, SweptPoint, pareto_set
from moesaic.report.drawing import CHILD, PARENT, new_figure, tidy
from moesaic.report.result_figures import draw_frontier
from moesaic.report.serving import MODELS, ServingEvidence, served_frontier

_COLOURS = {"parent": PARENT, "child": CHILD}


def draw_served_throughput(evidence: ServingEvidence) -> Figure:
    """Output tokens per second against users, one panel per workload."""
    figure, panels = _panels(evidence)
    for axes, workload in zip(panels, evidence.workloads, strict=True):
        sweeps = {model: evidence.sweep(model, workload) for model in MODELS}
        users = [swept.point.concurrency for swept in sweeps["parent"]]
        for model, sweep in sweeps.items():
            speeds = [swept.tokens_per_s for swept in sweep]
            slowest, fastest = [speed.min for speed in speeds], [speed.max for speed in speeds]
            axes.fill_between(users, slowest, fastest, color=_COLOURS[model], alpha=0.2)
            axes.plot(users, [speed.median for speed in speeds], "o-", color=_COLOURS[model])
        for old, new in zip(*sweeps.values(), strict=True):
            ratio = evidence.ratios[old.point]["tokens_per_s"].median
            place = old.point.concurrency, max(old.tokens_per_s.max, new.tokens_per_s.max)
            axes.annotate(f"{ratio:.2f}x", place, (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(users, [str(number) for number in users])
        axes.set_xlabel("users, each with one request in flight")
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.margins(x=0.12)
    panels[0].set_ylabel("output tokens per second, all users")
    return figure


def draw_served_latency(evidence: ServingEvidence) -> Figure:
    """System throughput against the speed one user sees, one panel per workload; filled: the Pareto set."""
    figure, panels = _panels(evidence)
    for axes, workload in zip(panels, evidence.workloads, strict=True):
        for model in MODELS:
            _draw_trade(axes, evidence.sweep(model, workload), _COLOURS[model])
        axes.set_xlabel("output tokens per second, one user")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.margins(x=0.12)
    panels[0].set_ylabel("output tokens per second, all users")
    return figure


def draw_served_frontier(evidence: ServingEvidence) -> Figure:
    """Accuracy against request rate, speeds through the server."""
    points = served_frontier(evidence)
    return draw_frontier(points, points[-1].deployment.effort)


def _panels(evidence: ServingEvidence) -> tuple[Figure, list[Axes]]:
    figure = new_figure(max(5.0, 4.2 * len(evidence.workloads)), 3.9)
    panels = list(np.atleast_1d(figure.subplots(1, len(evidence.workloads))))
    for axes, workload in zip(panels, evidence.workloads, strict=True):
        tidy(axes)
        point = evidence.sweep("parent", workload)[0].point
        axes.set_title(f"{workload}: {point.input_tokens} tokens in, {point.output_tokens} out")
    handles = [panels[0].plot([], [], "o-", color=colour, label=model)[0] for model, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure, panels


def _draw_trade(axes: Axes, sweep: list[SweptPoint], colour: str) -> None:
    kept = pareto_set(sweep)
    own = [swept.tokens_per_s_per_user for swept in sweep]
    together = [swept.tokens_per_s for swept in sweep]
    places = [one.median for one in own], [total.median for total in together]
    axes.errorbar(*places, _around(together), _around(own), color=colour, linewidth=1.2, capsize=2)
    for swept in sweep:
        place = swept.tokens_per_s_per_user.median, swept.tokens_per_s.median
        axes.plot(*place, "o", color=colour, markerfacecolor=colour if swept in kept else "white", zorder=4)
        axes.annotate(str(swept.point.concurrency), place, (6, 4), textcoords="offset points", fontsize=8, color=colour)


def _around(spreads: list[Spread]) -> list[list[float]]:
    """Distances from the medians down to the smallest and up to the largest."""
    return [[one.median - one.min for one in spreads], [one.max - one.median for one in spreads]]

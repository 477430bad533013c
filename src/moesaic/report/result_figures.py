"""Pictures of the results: the search's frontier, accuracy, speed, and both together."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.efficiency import FrontierPoint
from moesaic.report.drawing import CHILD, MARKERS, PARENT, new_figure, rival_colour, tidy
from moesaic.report.evidence import Evidence, Solution
from moesaic.report.findings import (
    context_pairs,
    contexts,
    longest_context,
    predictions,
    request_frontier,
)

_COLOURS = {"parent": PARENT, "child": CHILD}
_BASELINE_MARKERS = {"greedy": "D", "uniform": "s", "random": "X", "max_parameters": "P"}


def draw_search(evidence: Evidence) -> Figure:
    """Damage against what the frontier sweeps, with every candidate."""
    figure = new_figure(8.0, 4.4)
    axes = figure.subplots()
    line = sorted((_swept_ratio(evidence, solution), solution.damage) for solution in evidence.frontier)
    axes.plot(*zip(*line, strict=True), "o-", color=CHILD, markersize=4, linewidth=1.2, label="frontier of the search")
    seen: set[str] = set()
    for name, solution in evidence.candidates.items():
        group = "random" if name.startswith("random") else name
        place = _swept_ratio(evidence, solution), solution.damage
        if name == evidence.child.name:
            label = f"the child ({name})"
            axes.plot(*place, "*", color=CHILD, markersize=20, markeredgecolor="white", label=label, zorder=5)
        elif group.startswith("puzzle"):
            axes.plot(*place, "*", color=CHILD, markersize=10, fillstyle="none", label=group)
        else:
            marker = _BASELINE_MARKERS.get(group, "o")
            axes.plot(*place, marker, color=rival_colour(name), markersize=8, label=None if group in seen else group)
        seen.add(group)
    axes.plot(1, 0, "o", color=PARENT, markersize=9, label="parent")
    tidy(axes)
    swept = "parameters" if _workload(evidence) is None else f"predicted {evidence.swept}"
    axes.set(xlabel=f"{swept}, relative to the parent [x]", ylabel="damage: sum of scores")
    figure.legend(loc="outside right upper")
    return figure


def _workload(evidence: Evidence) -> str | None:
    name = evidence.swept.removeprefix("throughput of ")
    return name if name in evidence.parent.throughput_tokens_per_s else None


def _swept_ratio(evidence: Evidence, solution: Solution) -> float:
    name = _workload(evidence)
    if name is None:
        return solution.parameters / evidence.parent.parameters
    return solution.throughput_tokens_per_s[name] / evidence.parent.throughput_tokens_per_s[name]


def draw_efforts(evidence: Evidence) -> Figure:
    """Accuracy and generated tokens of parent and child at every effort."""
    figure = new_figure(9.0, 3.8)
    left, right = figure.subplots(1, 2)
    places = np.arange(len(evidence.efforts))
    for shift, (model, evaluation) in zip(
        (-0.2, 0.2), (("parent", evidence.evaluation_parent), ("child", evidence.evaluation_child)), strict=True
    ):
        results = [evaluation.efforts[effort] for effort in evidence.efforts]
        accuracy = left.bar(places + shift, [100 * result.accuracy for result in results], 0.38, color=_COLOURS[model])
        left.bar_label(accuracy, fmt="%.1f", fontsize=9)
        tokens = right.bar(
            places + shift, [result.tokens_per_request for result in results], 0.38, color=_COLOURS[model], label=model
        )
        right.bar_label(tokens, fmt="%.0f", fontsize=9)
    for axes in (left, right):
        tidy(axes)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(places, evidence.efforts)
        axes.set_xlabel("reasoning effort")
    left.set(ylabel="accuracy, mean over tasks [%]", ylim=(0, 108))
    right.set_ylabel("generated tokens per request")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_throughput(evidence: Evidence) -> Figure:
    """Measured output tokens per second against batch size, one panel per context."""
    measured = contexts(evidence)
    swept = [context for context in measured if len(context_pairs(evidence, *context)) > 1] or measured
    figure = new_figure(max(5.0, 4.2 * len(swept)), 3.9)
    panels = np.atleast_1d(figure.subplots(1, len(swept)))
    for axes, (input_tokens, output_tokens) in zip(panels, swept, strict=True):
        pairs = context_pairs(evidence, input_tokens, output_tokens)
        batches = [pair.setting.batch_size for pair in pairs]
        for model, colour in _COLOURS.items():
            speeds = [getattr(pair, model).tokens_per_s for pair in pairs]
            slowest, fastest = [speed.min for speed in speeds], [speed.max for speed in speeds]
            axes.fill_between(batches, slowest, fastest, color=colour, alpha=0.2)
            axes.plot(batches, [speed.median for speed in speeds], "o-", color=colour)
        for pair in pairs:
            place = pair.setting.batch_size, max(pair.child.tokens_per_s.max, pair.parent.tokens_per_s.max)
            axes.annotate(f"{pair.speedup:.2f}x", place, (0, 7), textcoords="offset points", ha="center", fontsize=9)
        tidy(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set(xlabel="batch size [requests]", title=f"{input_tokens} tokens in, {output_tokens} out")
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.margins(x=0.12)
    panels[0].set_ylabel("output tokens per second")
    handles = [panels[0].plot([], [], "o-", color=colour, label=model)[0] for model, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def draw_predictions(evidence: Evidence) -> Figure:
    """Predicted against measured speed-ups, for the workloads that were measured."""
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    markers, values = {"throughput": "o", "prefill": "s", "decode": "^"}, [1.0]
    found = [prediction for prediction in predictions(evidence) if prediction.measured is not None]
    for place, prediction in enumerate(found):
        measured = prediction.measured or {}
        for quantity, marker in markers.items():
            point = prediction.predicted[quantity], measured[quantity]
            values += point
            colour = (CHILD, "#d55e00", "#009e73", "#cc79a7")[place % 4]
            label = f"{prediction.workload}: {quantity}"
            axes.plot(*point, marker, color=colour, markersize=9, label=label, linestyle="none")
    low, high = 0.93 * min(values), 1.07 * max(values)
    axes.plot([low, high], [low, high], "--", color=PARENT, linewidth=1, label="as predicted")
    tidy(axes)
    axes.set(xlabel="predicted speed-up [x]", ylabel="measured speed-up [x]")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    if not found:
        axes.text(0.5, 0.5, "no workload was measured", transform=axes.transAxes, ha="center")
    figure.legend(loc="outside right upper")
    return figure


def draw_request_frontier(evidence: Evidence) -> Figure:
    """Accuracy against relative request rate for every effort (the paper's Fig. 1)."""
    return draw_frontier(request_frontier(evidence, *longest_context(evidence)), evidence.efforts[-1])


def draw_frontier(points: Sequence[FrontierPoint], top_effort: str) -> Figure:
    """Accuracy against request rate relative to the parent at its top effort."""
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    for model, colour in _COLOURS.items():
        line = [point for point in points if point.deployment.model == model]
        axes.plot([p.relative_rate for p in line], [100 * p.accuracy for p in line], "-", color=colour, linewidth=1.6)
        for point in line:
            place, effort = (point.relative_rate, 100 * point.accuracy), point.deployment.effort
            axes.plot(*place, MARKERS[effort], color=colour, markersize=10)
            axes.annotate(effort, place, (8, 6), textcoords="offset points", fontsize=9, color=colour)
    _label_models(axes)
    tidy(axes)
    axes.margins(x=0.12, y=0.15)
    axes.set_xscale("log", base=2)
    rates = [point.relative_rate for point in points]
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if 0.7 * min(rates) <= tick <= 1.4 * max(rates)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set(
        xlabel=f"requests per second, relative to the parent at {top_effort} effort",
        ylabel="accuracy, mean over tasks [%]",
    )
    return figure


def _label_models(axes: Axes) -> None:
    for model, colour in _COLOURS.items():
        axes.plot([], [], "-", color=colour, label=model)
    axes.legend()

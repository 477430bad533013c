"""Pictures of the results: the search's frontier, accuracy, speed in process and through a server, and all together."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.measure.benchmark_serving.load_sweep import Spread, SweptPoint, pareto_set
from moesaic.measure.efficiency import FrontierPoint
from moesaic.measure.report.drawing import (
    CHILD,
    COLOURS,
    MARKERS,
    PARENT,
    draw_throughputs,
    model_panels,
    new_figure,
    rival_colour,
    scale_request_rates,
    tidy,
)
from moesaic.measure.report.evidence import Candidate, Evidence
from moesaic.measure.report.findings import context_pairs, contexts, predictions, request_frontier
from moesaic.measure.report.serving import MODELS, ServingEvidence, served_frontier

_BASELINE_MARKERS = {
    "unrefined": "*",
    "greedy": "D",
    "uniform": "s",
    "uniform_width": "h",
    "uniform_memory": "v",
    "uniform_throughput": ">",
    "random": "X",
    "max_parameters": "P",
}


def draw_search(evidence: Evidence) -> Figure:
    """Damage against what the frontier sweeps, with every candidate whose damage is known."""
    figure = new_figure(8.0, 4.4)
    axes = figure.subplots()
    line = sorted((_swept_ratio(evidence, candidate), candidate.damage) for candidate in evidence.frontier)
    axes.plot(*zip(*line, strict=True), "o-", color=CHILD, markersize=4, linewidth=1.2, label="frontier of the search")
    seen: set[str] = set()
    for name, candidate in evidence.candidates.items():
        if candidate.damage is None:
            continue
        group = "random" if name.startswith("random") else name
        position = _swept_ratio(evidence, candidate), candidate.damage
        if name == evidence.child.name:
            label = f"the child ({name})"
            axes.plot(*position, "*", color=CHILD, markersize=20, markeredgecolor="white", label=label, zorder=5)
        elif group.startswith("puzzle"):
            axes.plot(*position, "*", color=CHILD, markersize=10, fillstyle="none", label=group)
        else:
            marker = _BASELINE_MARKERS.get(group, "o")
            axes.plot(*position, marker, color=rival_colour(name), markersize=8, label=None if group in seen else group)
        seen.add(group)
    axes.plot(1, 0, "o", color=PARENT, markersize=9, label="parent")
    tidy(axes)
    swept = "parameters" if _workload(evidence) is None else f"predicted {evidence.swept}"
    axes.set(xlabel=f"{swept}, relative to the parent [x]", ylabel="damage: sum of scores")
    figure.legend(loc="outside right upper")
    return figure


def draw_refinement(evidence: Evidence) -> Figure:
    """Measured damage of whole assemblies against the sum of their blocks' scores."""
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    best = min(evidence.refinement, key=lambda assembly: assembly.measured)
    for number, assembly in enumerate(evidence.refinement, 1):
        marker, size = ("*", 18) if assembly is best else ("o", 7)
        axes.plot(assembly.sum, assembly.measured, marker, color=CHILD, markersize=size, markeredgecolor="white")
        place = assembly.sum, assembly.measured
        axes.annotate(str(number), place, (6, 4), textcoords="offset points", fontsize=8, color=PARENT)
    sums = [assembly.sum for assembly in evidence.refinement]
    axes.axline((min(sums), min(sums)), slope=1, linestyle="--", color=PARENT, linewidth=1)
    tidy(axes)
    axes.set(xlabel="sum of the scores of its blocks", ylabel=f"measured damage ({evidence.metric})")
    axes.plot([], [], "*", color=CHILD, markersize=12, label="the child")
    axes.plot([], [], "--", color=PARENT, label="damages add up")
    axes.margins(0.08)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _workload(evidence: Evidence) -> str | None:
    name = evidence.swept.removeprefix("throughput of ")
    return name if name in evidence.parent.throughput_tokens_per_s else None


def _swept_ratio(evidence: Evidence, candidate: Candidate) -> float:
    name = _workload(evidence)
    if name is None:
        return candidate.parameters / evidence.parent.parameters
    return candidate.throughput_tokens_per_s[name] / evidence.parent.throughput_tokens_per_s[name]


def draw_efforts(evidence: Evidence) -> Figure:
    """Accuracy and generated tokens of parent and child at every effort."""
    figure = new_figure(9.0, 3.8)
    left, right = figure.subplots(1, 2)
    places = np.arange(len(evidence.efforts))
    for shift, (model, evaluation) in zip((-0.2, 0.2), evidence.evaluations.items(), strict=True):
        results = [evaluation.efforts[effort] for effort in evidence.efforts]
        accuracies, tokens = [100 * result.accuracy for result in results], [r.tokens_per_request for r in results]
        left.bar_label(left.bar(places + shift, accuracies, 0.38, color=COLOURS[model]), fmt="%.1f", fontsize=9)
        bars = right.bar(places + shift, tokens, 0.38, color=COLOURS[model], label=model)
        right.bar_label(bars, fmt="%.0f", fontsize=9)
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
    measured = {context: context_pairs(evidence, context) for context in contexts(evidence)}
    swept = {context: pairs for context, pairs in measured.items() if len(pairs) > 1} or measured
    figure, panels = model_panels([f"{context[0]} tokens in, {context[1]} out" for context in swept])
    for axes, pairs in zip(panels, swept.values(), strict=True):
        speeds = {model: [getattr(pair, model).tokens_per_s for pair in pairs] for model in COLOURS}
        batches = [pair.setting.batch_size for pair in pairs]
        draw_throughputs(axes, batches, speeds, [pair.speedup for pair in pairs])
        axes.set_xlabel("batch size [requests]")
    panels[0].set_ylabel("output tokens per second")
    return figure


def draw_predictions(evidence: Evidence) -> Figure:
    """Predicted against measured speed-ups, for the workloads that were measured."""
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    markers, values = {"throughput": "o", "prefill": "s", "decode": "^"}, [1.0]
    speedups = {entry.workload: (entry.predicted, entry.measured) for entry in predictions(evidence) if entry.measured}
    for place, (workload, (predicted, measured)) in enumerate(speedups.items()):
        for quantity, marker in markers.items():
            point = predicted[quantity], measured[quantity]
            values += point
            colour = (CHILD, "#d55e00", "#009e73", "#cc79a7")[place % 4]
            label = f"{workload}: {quantity}"
            axes.plot(*point, marker, color=colour, markersize=9, label=label, linestyle="none")
    low, high = 0.93 * min(values), 1.07 * max(values)
    axes.plot([low, high], [low, high], "--", color=PARENT, linewidth=1, label="as predicted")
    tidy(axes)
    axes.set(xlabel="predicted speed-up [x]", ylabel="measured speed-up [x]")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    if not speedups:
        axes.text(0.5, 0.5, "no workload was measured", transform=axes.transAxes, ha="center")
    figure.legend(loc="outside right upper")
    return figure


def draw_request_frontier(evidence: Evidence) -> Figure:
    """Accuracy against relative request rate for every effort (the paper's Fig. 1)."""
    return _draw_frontier(request_frontier(evidence), evidence.efforts[-1])


def draw_served_frontier(evidence: ServingEvidence) -> Figure:
    """Accuracy against relative request rate, speeds through the server."""
    points = served_frontier(evidence)
    return _draw_frontier(points, points[-1].deployment.effort)


def _draw_frontier(points: Sequence[FrontierPoint], top_effort: str) -> Figure:
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    for model, colour in COLOURS.items():
        line = [point for point in points if point.deployment.model == model]
        axes.plot([p.relative_rate for p in line], [100 * p.accuracy for p in line], "-", color=colour, linewidth=1.6)
        for point in line:
            place, effort = (point.relative_rate, 100 * point.accuracy), point.deployment.effort
            axes.plot(*place, MARKERS[effort], color=colour, markersize=10)
            beside, side = ((8, 6), "left") if model == "child" else ((-8, -14), "right")
            axes.annotate(effort, place, beside, textcoords="offset points", fontsize=9, color=colour, ha=side)
    axes.legend(handles=[axes.plot([], [], "-", color=colour, label=model)[0] for model, colour in COLOURS.items()])
    tidy(axes)
    axes.margins(x=0.12, y=0.15)
    scale_request_rates(axes, [point.relative_rate for point in points], top_effort)
    axes.set_ylabel("accuracy, mean over tasks [%]")
    return figure


def draw_served_throughput(evidence: ServingEvidence) -> Figure:
    """Output tokens per second against users, one panel per workload (the paper's Fig. 4)."""
    figure, panels = _serving_panels(evidence)
    for axes, workload in zip(panels, evidence.workloads, strict=True):
        sweeps = {model: evidence.sweep(model, workload) for model in MODELS}
        loads = [swept.point for swept in sweeps["parent"]]
        speeds = {model: [swept.tokens_per_s for swept in sweep] for model, sweep in sweeps.items()}
        ratios = [evidence.ratios[load]["tokens_per_s"].median for load in loads]
        draw_throughputs(axes, [load.concurrency for load in loads], speeds, ratios)
        axes.set_xlabel("users, each with one request in flight")
    return figure


def draw_served_latency(evidence: ServingEvidence) -> Figure:
    """System throughput against the speed one user sees, one panel per workload; filled: the Pareto set (Fig. 5)."""
    figure, panels = _serving_panels(evidence)
    for axes, workload in zip(panels, evidence.workloads, strict=True):
        for model in MODELS:
            _draw_trade(axes, evidence.sweep(model, workload), COLOURS[model])
        axes.set_xlabel("output tokens per second, one user")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.margins(x=0.12)
    return figure


def _serving_panels(evidence: ServingEvidence) -> tuple[Figure, list[Axes]]:
    loads = {workload: evidence.sweep("parent", workload)[0].point for workload in evidence.workloads}
    titles = [f"{name}: {load.input_tokens} tokens in, {load.output_tokens} out" for name, load in loads.items()]
    figure, panels = model_panels(titles)
    panels[0].set_ylabel("output tokens per second, all users")
    return figure, panels


def _draw_trade(axes: Axes, sweep: Sequence[SweptPoint], colour: str) -> None:
    kept = pareto_set(sweep)
    own = [swept.tokens_per_s_per_user for swept in sweep]
    together = [swept.tokens_per_s for swept in sweep]
    places = [one.median for one in own], [total.median for total in together]
    axes.errorbar(*places, _around(together), _around(own), color=colour, linewidth=1.2, capsize=2)
    for swept in sweep:
        place = swept.tokens_per_s_per_user.median, swept.tokens_per_s.median
        axes.plot(*place, "o", color=colour, markerfacecolor=colour if swept in kept else "white", zorder=4)
        axes.annotate(str(swept.point.concurrency), place, (6, 4), textcoords="offset points", fontsize=8, color=colour)


def _around(spreads: Sequence[Spread]) -> list[list[float]]:
    """Distances from the medians down to the smallest and up to the largest."""
    return [[one.median - one.min for one in spreads], [one.max - one.median for one in spreads]]

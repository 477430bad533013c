"""Pictures of recovery: the frontier it reaches, what every stage gave, and how distillation went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from moesaic.core.config import CacheDtype, Effort
from moesaic.measure.efficiency import FrontierPoint, retention
from moesaic.measure.report.drawing import (
    EFFORT_COLOURS,
    MARKERS,
    PARENT,
    STAGES,
    new_figure,
    scale_request_rates,
    stage_colours,
    tidy,
)
from moesaic.measure.report.evidence import Evaluation
from moesaic.measure.report.recovery import (
    AVERAGED,
    DISTILLED,
    FP8,
    PRUNED,
    Recovery,
    RecoveryEvidence,
    recovery_frontier,
)
from moesaic.measure.report.tables import stage_name
from moesaic.measure.report.tables import tokens as write_tokens

_LINES: Mapping[CacheDtype, str] = {"bf16": "--", "fp8": "-"}
_LOSSES = {"kl": "KL(parent || child)", "hidden": "1 - cosine of hidden states", "lm": "cross entropy with the traces"}
_LOSSES |= {"top1": "share of next tokens as the parent's"}
_WIDE = 4.0
"""Curves that change by more than this factor are drawn on a logarithmic scale."""
_FAINT_PARENT = 0.1
"""Below this accuracy of the parent a ratio to it is mostly noise."""
_RETENTION_SHOWN = 0.5
"""Colours run this far below and above the parent."""


def draw_recovery_frontier(evidence: RecoveryEvidence) -> Figure:
    """Accuracy against relative request rate: the models that are served, and how the child came to be one."""
    points = recovery_frontier(evidence)
    final = ["parent", *([evidence.baseline.candidate] if evidence.baseline else []), AVERAGED]
    way = ["parent", *evidence.child.training_stages]
    colours = _colours(evidence)
    figure = new_figure(11.6, 5.4)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _draw_models(left, points, [(model, kv_cache) for model in final for kv_cache in _LINES], colours)
    _draw_models(right, points, [(model, "bf16") for model in way], colours)
    shown = "parent, recovered child and baseline" if evidence.baseline else "parent and recovered child"
    left.set(title=shown, ylabel="accuracy, mean over tasks [%]")
    right.set(title="the child after every stage, KV cache in BF16")
    for axes in (left, right):
        tidy(axes)
        axes.margins(x=0.1, y=0.1)
        scale_request_rates(axes, [point.relative_rate for point in points], evidence.efforts[-1])
    models = dict.fromkeys(point.deployment.model for point in points)
    handles = [Line2D([], [], color=colours[name], lw=2, label=_model_name(evidence, name)) for name in models]
    handles += [Line2D([], [], color="black", ls=style, label=f"KV {kv.upper()}") for kv, style in _LINES.items()]
    handles += [
        Line2D([], [], color="black", ls="none", marker=MARKERS[effort], label=f"{effort} effort")
        for effort in evidence.efforts
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _draw_models(
    axes: Axes,
    points: Sequence[FrontierPoint],
    models: Sequence[tuple[str, CacheDtype]],
    colours: Mapping[str, str],
) -> None:
    """A line per model and KV cache: FP8 solid with filled markers, BF16 dashed with open ones on top."""
    for model, kv_cache in models:
        line = [p for p in points if (p.deployment.model, p.deployment.kv_cache) == (model, kv_cache)]
        rates, accuracies = [p.relative_rate for p in line], [100 * p.accuracy for p in line]
        axes.plot(rates, accuracies, _LINES[kv_cache], color=colours[model], linewidth=1.5)
        fill = colours[model] if kv_cache == "fp8" else "white"
        for point, rate, accuracy in zip(line, rates, accuracies, strict=True):
            marker = MARKERS[point.deployment.effort]
            axes.plot(rate, accuracy, marker, markersize=8, color=colours[model], markerfacecolor=fill)


def _model_name(evidence: RecoveryEvidence, model: str) -> str:
    if evidence.baseline and model == evidence.baseline.candidate:
        return f"{model}, same recovery"
    return stage_name(model)


def _colours(evidence: RecoveryEvidence) -> dict[str, str]:
    baseline = None if evidence.baseline is None else evidence.baseline.candidate
    return stage_colours(evidence.child.policies, baseline)


def _label_stages(axes: Axes, evidence: RecoveryEvidence, rotation: int) -> None:
    names = [stage_name(stage) for stage in evidence.child.stages]
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha="right")


def draw_contributions(evidence: RecoveryEvidence) -> Figure:
    """Accuracy after every stage, a panel per effort; policies branch off the distilled child."""
    figure = new_figure(max(8.0, 3.9 * len(evidence.efforts)), 4.6)
    panels = np.atleast_1d(figure.subplots(1, len(evidence.efforts)))
    for axes, effort in zip(panels, evidence.efforts, strict=True):
        parent = 100 * evidence.parent.efforts[effort].accuracy
        axes.axhline(parent, color=PARENT, linestyle=":", linewidth=1.6)
        for recovery in evidence.recoveries[::-1]:
            colour = _candidate_colour(evidence, recovery)
            _draw_steps(axes, recovery, effort, colour, labelled=recovery is evidence.child)
        tidy(axes)
        axes.grid(visible=False, axis="x")
        _label_stages(axes, evidence, rotation=40)
        axes.set(title=f"{effort} effort", xlim=(-0.6, len(evidence.child.stages) - 0.4))
        axes.margins(y=0.16)
    panels[0].set_ylabel("accuracy, mean over tasks [%]")
    handles = [Line2D([], [], color=PARENT, ls=":", lw=1.6, label="parent")]
    handles += [
        Line2D([], [], color=_candidate_colour(evidence, one), marker="o", label=one.candidate)
        for one in evidence.recoveries
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _candidate_colour(evidence: RecoveryEvidence, recovery: Recovery) -> str:
    return _colours(evidence)[AVERAGED if recovery is evidence.child else recovery.candidate]


def _draw_steps(axes: Axes, recovery: Recovery, effort: Effort, colour: str, labelled: bool) -> None:
    places = {stage: place for place, stage in enumerate(recovery.stages)}
    heights = {stage: 100 * evaluation.efforts[effort].accuracy for stage, evaluation in recovery.stages.items()}
    way = [stage for stage in recovery.stages if stage in (PRUNED, DISTILLED, AVERAGED, FP8)]
    axes.step([places[s] for s in way], [heights[s] for s in way], where="mid", color=colour, linewidth=1.6)
    for stage, place in places.items():
        marker, size = ("o", 7) if stage in way else ("D", 5)
        error = 100 * recovery.stages[stage].efforts[effort].standard_error if labelled else 0
        axes.errorbar(place, heights[stage], error, fmt=marker, color=colour, markersize=size, elinewidth=1, alpha=0.9)
        if labelled:
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5, "zorder": 5}
            text = axes.annotate(f"{heights[stage]:.1f}", (place, heights[stage] + error), (0, 5), **style)
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def draw_retention(evidence: RecoveryEvidence) -> Figure:
    """The child's accuracy over the parent's, per task, stage and effort."""
    tasks = list(evidence.parent.efforts[evidence.efforts[-1]].tasks)
    stages = list(evidence.child.stages)
    norm = TwoSlopeNorm(1.0, 1 - _RETENTION_SHOWN, 1 + _RETENTION_SHOWN)
    height = len(evidence.efforts) * (0.3 * (len(tasks) + 1) + 0.35) + 1.1
    figure = new_figure(max(7.0, 2.4 + 0.85 * len(stages)), height)
    panels = np.atleast_1d(figure.subplots(len(evidence.efforts), 1, sharex=True))
    for axes, effort in zip(panels, evidence.efforts, strict=True):
        table, accuracies = _retentions(evidence, effort, tasks, stages)
        image = axes.imshow(table, cmap="RdBu", norm=norm, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                colour = "white" if abs(value - 1) > 0.6 * _RETENTION_SHOWN else "black"
                faint = accuracies[row] < _FAINT_PARENT
                text = f"({100 * value:.0f})" if faint else f"{100 * value:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
        names = [f"{name} ({100 * accuracy:.0f})" for name, accuracy in zip(["all", *tasks], accuracies, strict=True)]
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{effort} effort")
        axes.tick_params(length=0)
        axes.axhline(0.5, color="white", linewidth=3)
    _label_stages(panels[-1], evidence, rotation=30)
    bar = figure.colorbar(image, ax=panels, extend="both", ticks=[0.5, 0.75, 1.0, 1.25, 1.5], pad=0.02, aspect=40)
    bar.ax.set_yticklabels(["50 %", "75 %", "as the parent", "125 %", "150 %"])
    return figure


def _retentions(
    evidence: RecoveryEvidence, effort: Effort, tasks: Sequence[str], stages: Sequence[str]
) -> tuple[np.ndarray, list[float]]:
    """Rows: the suite, then its tasks. With them the parent's accuracies."""
    parent = evidence.parent.efforts[effort]
    accuracies = [parent.accuracy, *(parent.tasks[task].accuracy for task in tasks)]
    table = np.full((len(accuracies), len(stages)), np.nan)
    for column, stage in enumerate(stages):
        child = evidence.child.stages[stage].efforts[effort]
        for row, accuracy in enumerate([child.accuracy, *(child.tasks[task].accuracy for task in tasks)]):
            share = retention(accuracy, accuracies[row])
            table[row, column] = np.nan if share is None else share
    return table, accuracies


def draw_tokens(evidence: RecoveryEvidence) -> Figure:
    """Generated tokens per request: before and after recovery, and relative to the parent after every stage."""
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    _draw_token_bars(left, evidence)
    stages = list(evidence.child.stages)
    right.axhline(1, color=PARENT, linestyle=":", linewidth=1.6)
    shifts = np.linspace(-0.12, 0.12, len(evidence.efforts))
    for shift, effort in zip(shifts, evidence.efforts, strict=True):
        parent = evidence.parent.efforts[effort].tokens_per_request
        ratios = [evidence.child.stages[stage].efforts[effort].tokens_per_request / parent for stage in stages]
        style = {"color": EFFORT_COLOURS[effort], "marker": MARKERS[effort], "label": f"{effort} effort"}
        right.plot(np.arange(len(stages)) + shift, ratios, linestyle="none", markersize=8, **style)
    _label_stages(right, evidence, rotation=30)
    right.set_ylabel("tokens relative to the parent's [x]")
    right.margins(y=0.2)
    for axes in (left, right):
        tidy(axes)
        axes.grid(visible=False, axis="x")
    right.legend(loc="upper left", bbox_to_anchor=(0, 1.13), ncols=3)
    return figure


def _draw_token_bars(axes: Axes, evidence: RecoveryEvidence) -> None:
    models: dict[str, Evaluation] = {"parent": evidence.parent}
    models |= {stage: evidence.child.stages[stage] for stage in (PRUNED, AVERAGED)}
    places = np.arange(len(evidence.efforts))
    for shift, (name, evaluation) in zip((-0.27, 0.0, 0.27), models.items(), strict=True):
        tokens = [evaluation.efforts[effort].tokens_per_request for effort in evidence.efforts]
        bars = axes.bar(places + shift, tokens, 0.25, color=STAGES[name], label=name)
        axes.bar_label(bars, [write_tokens(value) for value in tokens], fontsize=8.5, padding=1)
    axes.set_xticks(places, evidence.efforts)
    axes.set(xlabel="reasoning effort", ylabel="generated tokens per request")
    axes.margins(y=0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.13), ncols=3)


def draw_distillation(evidence: RecoveryEvidence) -> Figure:
    """The distillation's losses on training and on held-out traces."""
    series = evidence.child.series()
    figure = new_figure(max(5.6, 3.7 * len(series)), 3.7)
    if not series:
        figure.text(0.5, 0.5, "no curve was recorded: the child was handed on undistilled", ha="center")
        return figure
    panels = np.atleast_1d(figure.subplots(1, len(series)))
    for axes, (name, curves) in zip(panels, series.items(), strict=True):
        axes.plot(*zip(*curves["training"], strict=True), color=STAGES[DISTILLED], linewidth=1, label="training")
        held_out = {"color": STAGES[AVERAGED], "marker": "o", "markersize": 4, "linewidth": 1.8}
        axes.plot(*zip(*curves["held out"], strict=True), **held_out, label="held out")
        tidy(axes)
        values = [value for points in curves.values() for _, value in points]
        if max(values) > _WIDE * min(values) > 0:
            _make_logarithmic(axes)
        axes.set(title=_LOSSES.get(name, name), xlabel="optimiser step")
    figure.legend(handles=panels[0].get_legend_handles_labels()[0], loc="outside upper center", ncols=2)
    return figure


def _make_logarithmic(axes: Axes) -> None:
    """With plain numbers, as curves rarely span a power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

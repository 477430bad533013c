"""Drawing functions that all figures share: colours, axes, and PNG output."""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.measure.benchmark_serving.load_sweep import Spread

PARENT = "#5b6470"
CHILD = "#0072b2"
COLOURS = {"parent": PARENT, "child": CHILD}
CHOSEN = "#00a5e0"
RIVALS = {
    "unrefined": "#56b4e9",
    "greedy": "#d55e00",
    "uniform": "#009e73",
    "uniform_reap": "#984ea3",
    "uniform_width": "#66c2a5",
    "uniform_memory": "#a6d854",
    "uniform_throughput": "#1b6e52",
    "random": "#cc79a7",
    "max_parameters": "#e69f00",
}
STAGES = {"parent": PARENT, "pruned": "#d55e00", "distilled": "#56b4e9", "averaged": CHILD}
_POLICIES = ("#cc79a7", "#e69f00", "#a6761d", "#6a3d9a")
EFFORT_COLOURS = {"low": "#7fb8da", "medium": "#2f7fb8", "high": "#0b2f5b"}
MARKERS = {"low": "o", "medium": "s", "high": "^"}
OTHER = "#8a8a8a"
GRID = "#e4e6ea"
_FULL = "#12355b"
_WINDOWS = ("#f2c879", "#7fb6a4", "#3f8fb5", "#6a6fb0")
_DPI = 130


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with automatic layout; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes) -> None:
    """Remove the upper and right frame and add a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def model_panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A row of panels that compare parent and child, the two in a legend above."""
    figure = new_figure(max(5.0, 4.2 * len(titles)), 3.9)
    panels = list(np.atleast_1d(figure.subplots(1, len(titles))))
    for axes, title in zip(panels, titles, strict=True):
        tidy(axes)
        axes.set_title(title)
    handles = [panels[0].plot([], [], "o-", color=colour, label=model)[0] for model, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure, panels


def draw_throughputs(
    axes: Axes, loads: Sequence[int], tokens_per_s: Mapping[str, Sequence[Spread]], ratios: Sequence[float]
) -> None:
    """Throughput of both models against load: medians, bands from slowest to fastest, child over parent as labels."""
    for model, speeds in tokens_per_s.items():
        slowest, fastest = [speed.min for speed in speeds], [speed.max for speed in speeds]
        axes.fill_between(loads, slowest, fastest, color=COLOURS[model], alpha=0.2)
        axes.plot(loads, [speed.median for speed in speeds], "o-", color=COLOURS[model])
    for load, ratio, *speeds in zip(loads, ratios, *tokens_per_s.values(), strict=True):
        place = load, max(speed.max for speed in speeds)
        axes.annotate(f"{ratio:.2f}x", place, (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(load) for load in loads])
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.margins(x=0.12)


def scale_request_rates(axes: Axes, rates: Sequence[float], top_effort: str) -> None:
    """An x axis of request rates relative to the parent, in powers of two."""
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if 0.7 * min(rates) <= tick <= 1.4 * max(rates)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xlabel(f"requests per second, relative to the parent at {top_effort} effort")


def window_colours(windows: Iterable[int | None]) -> dict[int | None, str]:
    """A colour for every distinct window, short ones light, full attention dark."""
    distinct = sorted({window for window in windows if window is not None})
    last = max(1, len(distinct) - 1)
    colours: dict[int | None, str] = {
        window: _WINDOWS[round(place / last * (len(_WINDOWS) - 1))] for place, window in enumerate(distinct)
    }
    return colours | {None: _FULL}


def window_name(window: int | None) -> str:
    """The label of a window."""
    return "full attention" if window is None else f"window of {window}"


def rival_colour(name: str) -> str:
    """The colour of a baseline."""
    return RIVALS.get("random" if name.startswith("random") else name, OTHER)


def stage_colours(policies: Iterable[str], baseline: str | None) -> dict[str, str]:
    """A colour for the parent, for the child after every stage, and for the baseline that got the same recovery."""
    colours = {policy: _POLICIES[place % len(_POLICIES)] for place, policy in enumerate(policies)}
    return STAGES | colours | ({} if baseline is None else {baseline: rival_colour(baseline)})


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, without the time or other metadata that would vary."""
    content = io.BytesIO()
    with rc_context({"font.size": 10}):
        figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()

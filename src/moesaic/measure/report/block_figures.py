"""Pictures of the blocks: which were kept, how much each expert matters, and what each replacement costs."""

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moesaic.measure.report.drawing import CHOSEN, GRID, PARENT, new_figure, window_colours, window_name
from moesaic.measure.report.evidence import Evidence
from moesaic.models.architecture import AXES, Block

_MANY_EXPERTS = 32
_NO_DAMAGE = 1e-12
_DECADES = 1e4


def draw_architecture(evidence: Evidence) -> Figure:
    """Experts kept per layer as bars, coloured by the attention window (the paper's Fig. 2)."""
    parent, child = evidence.parent.architecture.blocks, evidence.child.architecture.blocks
    layers = np.arange(len(child))
    colours = window_colours(block.window for block in (*parent, *child))
    figure = new_figure(width=max(8.0, 0.5 * len(child)), height=3.9)
    axes = figure.subplots()
    axes.bar(layers, [block.num_experts for block in parent], 0.78, fill=False, edgecolor=PARENT, linestyle=":")
    axes.bar(layers, [block.num_experts for block in child], 0.78, color=[colours[block.window] for block in child])
    top = max(block.num_experts for block in parent)
    for layer, (old, new) in enumerate(zip(parent, child, strict=True)):
        label = "\n".join([str(new.num_experts), *_other_changes(old, new)])
        axes.text(layer, new.num_experts + 0.01 * top, label, ha="center", va="bottom", fontsize=9, linespacing=0.9)
        if old.window != new.window:
            axes.plot(layer, 0.06 * top, marker="v", color="white", markersize=8)
    axes.set(xlabel="layer", ylabel="experts", xticks=layers, ylim=(0, 1.2 * top))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles: list[Artist] = [Patch(facecolor=colour, label=window_name(window)) for window, colour in colours.items()]
    handles.append(Patch(fill=False, edgecolor=PARENT, linestyle=":", label="parent's experts"))
    handles.append(axes.plot([], [], "v", color="white", markeredgecolor="black", label="was full attention")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _other_changes(old: Block, new: Block) -> list[str]:
    """What is less than in the parent and is drawn neither as a bar's height nor as its colour."""
    return [
        axis.label.format(axis.text(getattr(new, name)))
        for name, axis in AXES.items()
        if name not in ("num_experts", "window") and getattr(new, name) != getattr(old, name)
    ]


def draw_importance(evidence: Evidence) -> Figure:
    """Every expert's place in its layer's order, and whether the child kept it."""
    num_layers, num_experts = len(evidence.ranking), max(len(order) for order in evidence.ranking)
    importance = np.full((num_layers, num_experts), np.nan)
    figure = new_figure(width=max(8.0, 0.12 * num_experts), height=max(3.4, 0.27 * num_layers + 1.4))
    axes = figure.subplots()
    size = 60.0 if num_experts <= _MANY_EXPERTS else 8.0
    for layer, (order, block) in enumerate(zip(evidence.ranking, evidence.child.architecture.blocks, strict=True)):
        importance[layer, list(order)] = 1 - np.arange(len(order)) / max(1, len(order) - 1)
        removed = list(order)[block.num_experts :]
        axes.scatter(removed, [layer] * len(removed), marker="x", s=size, color="#c1272d", linewidths=1.6)
        for expert in list(order)[: block.num_experts]:
            axes.add_patch(Rectangle((expert - 0.46, layer - 0.46), 0.92, 0.92, fill=False, edgecolor="black", lw=0.8))
    image = axes.imshow(importance, cmap="Blues", aspect="auto", vmin=0, vmax=1.15)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], boundaries=np.linspace(0, 1, 65))
    bar.ax.set_yticklabels(["least", "most"])
    bar.set_label("importance (rank in its layer)")
    axes.set(xlabel="expert (number in the parent)", ylabel="layer", yticks=range(num_layers))
    return figure


def draw_damage(evidence: Evidence) -> Figure:
    """Damage of every replacement, on short and on long context; the child's choices are outlined."""
    num_layers = evidence.parent.architecture.num_layers
    blocks = sorted({entry.block for entry in evidence.damages}, key=lambda block: block.sizes[::-1])
    shape = (len(blocks), num_layers)
    tables = {"short context": np.full(shape, np.nan), "long context": np.full(shape, np.nan)}
    for entry in evidence.damages:
        place = blocks.index(entry.block), entry.layer
        tables["short context"][place], tables["long context"][place] = entry.short, entry.long
    norm = _damage_scale(np.concatenate([table.ravel() for table in tables.values()]))
    figure = new_figure(width=max(8.0, 0.5 * num_layers + 3.0), height=max(4.0, 0.22 * len(blocks) + 1.2))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, table) in zip(panels, tables.items(), strict=True):
        axes.set_facecolor(GRID)
        image = axes.imshow(np.maximum(table, norm.vmin or 0), cmap="magma_r", aspect="auto", norm=norm)
        _outline_choices(axes, evidence, blocks)
        axes.set(title=title, xlabel="layer", xticks=range(num_layers))
    panels[0].set_ylabel(f"block ({' / '.join(axis.title for axis in AXES.values())})")
    panels[0].set_yticks(range(len(blocks)), [block.label for block in blocks])
    figure.colorbar(image, ax=panels, label=f"damage ({evidence.metric})")
    return figure


def _damage_scale(damages: NDArray[np.float64]) -> LogNorm:
    """Four powers of ten below the largest damage; what rounding leaves of an unchanged block is below them all."""
    most = max(np.nanmax(damages), _NO_DAMAGE)
    least = np.nanmin(np.where(damages > most / _DECADES, damages, most))
    return LogNorm(min(least, most / 10), most)


def _outline_choices(axes: Axes, evidence: Evidence, blocks: list[Block]) -> None:
    for layer, block in enumerate(evidence.child.architecture.blocks):
        if block in blocks:
            row = blocks.index(block)
            axes.add_patch(Rectangle((layer - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor=CHOSEN, lw=2))

"""Draw what ``experiment.py`` found, with intervals: every arm against the parent, stage by stage, and the retention of
accuracy at every effort against the tokens that a request takes.

python benchmarks/experiment_figure.py RECORD.json ARMS.png RETENTION.png
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.measure.report.drawing import STAGES, new_figure, rival_colour, stage_colours, tidy, to_png

SHOWN = ("pruned", "distilled", "averaged")
"""The stages that are drawn, a line each."""
WAY = {"pruned": "o", "distilled": "s", "policy high": "^", "policy low": "v", "averaged": "D"}
"""The child's stages and their markers."""
STEPS = (
    ("pruned", "distilled"),
    ("distilled", "policy high"),
    ("distilled", "policy low"),
    ("policy high", "averaged"),
    ("policy low", "averaged"),
)
"""Which stage comes out of which."""
OWN_COLOURS = {"refined": "#a6761d", "parent": STAGES["parent"]}
FAR_BEHIND = ("random-0", "greedy", "axes", "uniform_throughput")
"""Arms that would leave the others no room."""


def main() -> None:
    """Read the record, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("arms", type=Path)
    parser.add_argument("retention", type=Path)
    given = parser.parse_args()
    record = json.loads(given.record.read_text())
    given.arms.write_bytes(to_png(draw_arms(record)))
    given.retention.write_bytes(to_png(draw_retention(record)))


def draw_arms(record: Mapping[str, Any]) -> Figure:
    """Every arm's points against the parent after every stage, a panel for each effort and one for their mean."""
    arms = [*record["arms"], *(["parent"] if "averaged" in record["accuracy"].get("parent", {}) else [])]
    efforts = [*record["accuracy"]["parent"]["parent"], "mean"]
    figure = new_figure(3.1 * len(efforts), 1.2 + 0.55 * len(arms))
    panels = figure.subplots(1, len(efforts), sharey=True)
    for axes, effort in zip(panels, efforts, strict=True):
        for row, arm in enumerate(arms):
            draw_arm(
                axes,
                row,
                {stage: told[effort] for stage, told in against_parent(record, arm).items() if stage in SHOWN},
            )
        axes.axvline(0, color=STAGES["parent"], linewidth=1.2)
        axes.set(
            title=f"{effort} effort" if effort != "mean" else "mean of efforts", xlabel="points against the parent"
        )
        tidy(axes)
    panels[0].set_yticks(range(len(arms)), [name_of(arm) for arm in arms])
    panels[0].invert_yaxis()
    handles = [panels[0].plot([], [], "o", color=STAGES[stage], label=stage)[0] for stage in SHOWN]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(SHOWN))
    return figure


def draw_retention(record: Mapping[str, Any]) -> Figure:
    """Accuracy and tokens over the parent's, a panel for each effort: the child's way, and where other arms end."""
    efforts = list(record["accuracy"]["parent"]["parent"])
    rivals = {arm: rival_colour(arm) for arm in record["arms"] if arm not in ("puzzle", *FAR_BEHIND)} | OWN_COLOURS
    colours = stage_colours(["policy high", "policy low"], None)
    figure = new_figure(4.4 * len(efforts), 4.4)
    for axes, effort in zip(figure.subplots(1, len(efforts)), efforts, strict=True):
        way = {stage: over_parent(record, "puzzle", stage, effort) for stage in WAY}
        for before, after in STEPS:
            (x, y, _), (then_x, then_y, _) = way[before], way[after]
            axes.plot([x, then_x], [y, then_y], color=STAGES["parent"], linewidth=0.8, zorder=1)
        points = [(stage, colours[stage], marker, way[stage]) for stage, marker in WAY.items()]
        points += [
            (f"{name_of(arm)}, the end".replace("\n", " "), colour, "X", over_parent(record, arm, "averaged", effort))
            for arm, colour in rivals.items()
        ]
        for label, colour, marker, (x, y, ends) in points:
            axes.plot([x, x], ends, color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(x, y, marker, color=colour, markersize=7, label=label)
        axes.plot(1, 100, "*", color=STAGES["parent"], markersize=13, label="parent")
        axes.axhline(100, color=STAGES["parent"], linewidth=0.8)
        axes.set(title=f"{effort} effort", xlabel="generated tokens per request over the parent's")
        tidy(axes)
    panels = figure.axes
    panels[0].set_ylabel("accuracy over the parent's [%]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def over_parent(record: Mapping[str, Any], arm: str, stage: str, effort: str) -> tuple[float, float, list[float]]:
    """Tokens per request over the parent's; accuracy in percent of the parent's, and the ends of its interval."""
    accuracy, tokens = record["accuracy"], record["tokens_per_request"]
    whole, usual = accuracy["parent"]["parent"][effort], tokens["parent"]["parent"][effort]
    told = against_parent(record, arm)[stage][effort]
    ends = [100 + 100 * told[end] / whole for end in ("low_points", "high_points")]
    return tokens[arm][stage][effort] / usual, 100 * accuracy[arm][stage][effort] / whole, ends


def against_parent(record: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """By stage the arm's differences from the parent as it is."""
    other = "parent" if arm == "parent" else "parent, parent"
    found = {stage: record["differences"].get(f"{arm}, {stage} - {other}") for stage in WAY}
    return {stage: told for stage, told in found.items() if told}


def draw_arm(axes: Axes, row: int, stages: Mapping[str, Mapping[str, float]]) -> None:
    """A point and its interval for every stage, one below the other."""
    for stage, told in stages.items():
        place = row + 0.22 * (SHOWN.index(stage) - 1)
        axes.plot([told["low_points"], told["high_points"]], [place] * 2, color=STAGES[stage], linewidth=2)
        axes.plot(told["points"], place, "o", color=STAGES[stage], markersize=5)


def name_of(arm: str) -> str:
    """What a row is called."""
    return "parent, same\nreinforcement" if arm == "parent" else arm.replace("_", " ")


if __name__ == "__main__":
    main()

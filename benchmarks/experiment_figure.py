"""Draw what ``experiment.py`` found: every arm against the parent, stage by stage, with intervals.

python benchmarks/experiment_figure.py RECORD.json FIGURE.png
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moesaic.measure.report.drawing import STAGES, new_figure, tidy, to_png

SHOWN = ("pruned", "distilled", "averaged")
"""The stages that are drawn, a line each."""


def main() -> None:
    """Read the record, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("figure", type=Path)
    given = parser.parse_args()
    record = json.loads(given.record.read_text())
    arms = [*record["arms"], *(["parent"] if "averaged" in record["accuracy"].get("parent", {}) else [])]
    efforts = [*record["accuracy"]["parent"]["parent"], "mean"]
    figure = new_figure(3.1 * len(efforts), 1.2 + 0.55 * len(arms))
    panels = figure.subplots(1, len(efforts), sharey=True)
    for axes, effort in zip(panels, efforts, strict=True):
        for row, arm in enumerate(arms):
            draw_arm(axes, row, {stage: told[effort] for stage, told in against_parent(record, arm).items()})
        axes.axvline(0, color=STAGES["parent"], linewidth=1.2)
        axes.set(
            title=f"{effort} effort" if effort != "mean" else "mean of efforts", xlabel="points against the parent"
        )
        tidy(axes)
    panels[0].set_yticks(range(len(arms)), [name_of(arm) for arm in arms])
    panels[0].invert_yaxis()
    handles = [panels[0].plot([], [], "o", color=STAGES[stage], label=stage)[0] for stage in SHOWN]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(SHOWN))
    given.figure.write_bytes(to_png(figure))


def against_parent(record: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """By stage the arm's differences from the parent as it is."""
    found = {stage: record["differences"].get(f"{arm}, {stage} - parent, parent") for stage in SHOWN}
    if arm == "parent":
        found["averaged"] = record["differences"]["parent, averaged - parent"]
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

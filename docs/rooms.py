"""Draw which room imports which, from the code: ``python docs/rooms.py`` writes ``docs/images/rooms.png``.

An arrow leads from a room to one that it imports, and its width grows with the number of imports; one that other arrows
lead to as well is left out. Arrows lead downwards only: ``make check`` holds the code to the order of the rows.
"""

import tomllib
from pathlib import Path

import grimp
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.png"
_HEIGHT = 0.5


def rows() -> list[list[str]]:
    """The rooms from top to bottom, as the import contract has them; rooms of one row do not depend on their order."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"].startswith("Rooms"))
    return [[room.strip(" ()") for room in row.split(":")] for row in layers]


def imports() -> dict[tuple[str, str], int]:
    """The number of modules of one room that import modules of another."""
    graph = grimp.build_graph("moesaic")
    counts: dict[tuple[str, str], int] = {}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = _room(importer), _room(imported)
            if all(pair) and pair[0] != pair[1]:
                counts[pair] = counts.get(pair, 0) + 1
    return counts


def shortest(pairs: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Without the imports of rooms that are reached through another room anyway."""

    def reached(room: str) -> set[str]:
        below = {imported for importer, imported in pairs if importer == room}
        return below.union(*map(reached, below))

    return {
        (importer, imported): count
        for (importer, imported), count in pairs.items()
        if not any(imported in reached(via) for one, via in pairs if one == importer)
    }


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def draw(axes: Axes) -> None:
    """Boxes in rows, arrows between them."""
    places = {}
    levels = rows()
    for level, rooms in enumerate(levels):
        for index, room in enumerate(rooms):
            places[room] = ((index - (len(rooms) - 1) / 2) * 3.2 + 0.9 * (-1) ** level, -level * 1.1)
    for (importer, imported), count in shortest(imports()).items():
        start, end = places[importer], places[imported]
        bend = 0.18 if start[0] <= end[0] else -0.18
        axes.annotate(
            "",
            xy=(end[0], end[1] + _HEIGHT / 2),
            xytext=(start[0], start[1] - _HEIGHT / 2),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "0.55",
                "linewidth": 0.5 + count**0.5 / 4,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
    for room, (x, y) in places.items():
        axes.text(
            x,
            y,
            room,
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "#e8f0fb", "edgecolor": "#2b5c9e"},
        )
    axes.set(xlim=(-3.4, 3.4), ylim=(-1.1 * len(levels) + 0.5, 0.6))
    axes.axis("off")


def main() -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(6, 8), layout="constrained")
    draw(axes)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()

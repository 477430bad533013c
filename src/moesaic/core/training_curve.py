"""The training curve on disk: lines ``{"step": int, name: float}`` in the order of training, without times.

A run that was killed goes on from its last checkpoint; what it had written of later steps is forgotten first.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from moesaic.core.files import write_text_atomically

CURVE = "training.jsonl"
"""The file beside trained weights with their training curve, a line per step."""
Row = dict[str, float]
"""A line of the curve."""


def read_curve(path: Path) -> list[Row]:
    """Read the lines of a curve, without one that a killed run left unfinished."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def resume_curve(path: Path, step: int) -> list[Row]:
    """Cut a curve back to the lines up to ``step`` and return them."""
    rows = kept_rows(path, step)
    write_text_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def kept_rows(path: Path, step: int) -> list[Row]:
    """The lines of a curve up to ``step``; none for step 0, where training starts anew."""
    return [row for row in read_curve(path) if row["step"] <= step] if step else []


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Append the figures of a step, or of an evaluation after it."""
    with path.open("a") as file:
        file.write(f"{json.dumps(row)}\n")

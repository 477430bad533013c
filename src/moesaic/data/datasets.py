"""Data sets: JSON lines, one object a row. A data set is such a file, or a directory that holds exactly one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError


@dataclass(frozen=True)
class Row:
    """One object, and where it stands for messages about it."""

    values: Mapping[str, Any]
    place: str


def read_rows(path: Path) -> list[Row]:
    """All rows of a data set, see :func:`iterate_rows`."""
    return list(iterate_rows(path))


def iterate_rows(path: Path) -> Iterator[Row]:
    """The rows of a data set, one after the other; blank lines do not count.

    Raises:
        ArtifactError: if it is missing, ambiguous, empty, or a line is not a JSON object; the message names the line.
    """
    file, empty = _find_file(path), True
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty = False
                yield _read_row(line, f"{file}, line {number}")
    if empty:
        raise ArtifactError(f"{file} is empty; a data set needs at least one JSON object, each on a line of its own")


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.jsonl"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or ("none" if path.is_dir() else "no such file or directory")
        raise ArtifactError(f"{path} must be a .jsonl file or a directory that holds exactly one; found {names}")
    return files[0]


def _read_row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as broken:
        raise ArtifactError(f"{place} is not valid JSON: {broken}") from broken
    if not isinstance(values, dict):
        raise ArtifactError(f"{place} must be a JSON object, found {type(values).__name__}")
    return Row(values, place)

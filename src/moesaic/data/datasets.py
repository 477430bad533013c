"""Data sets: JSON lines, one object a row. A data set is such a file, or a directory that holds exactly one."""

from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import foreign_kind, parse_json


@dataclass(frozen=True)
class Row:
    """One object, and where it stands for messages about it."""

    values: Mapping[str, Any]
    place: str


def read_rows(path: Path) -> list[Row]:
    """All rows of a data set, see :func:`iterate_rows`."""
    return list(iterate_rows(path))


def iterate_rows(path: Path) -> Iterator[Row]:
    """The rows of a data set; a row ends at a line feed and nowhere else, blank lines do not count.

    Raises:
        ArtifactError: if it is missing, ambiguous, empty, in another format, or a line is not a JSON object; the
            message names the line.
    """
    try:
        file = _find_file(path)
        empty = True
        with file.open("rb") as lines:
            if kind := foreign_kind(lines.peek()):
                raise ArtifactError(
                    f"{file} is {kind}; a data set is JSON lines in UTF-8: one JSON object on each line"
                )
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(BOM_UTF8) if number == 1 else line
                if text.strip(b" \t\r\n"):
                    empty = False
                    yield _read_row(text, f"{file}, line {number}")
    except OSError as unreadable:
        raise ArtifactError(f"{unreadable.filename} cannot be read: {unreadable.strerror}") from unreadable
    if empty:
        raise ArtifactError(f"{file} is empty; a data set needs at least one JSON object, each on a line of its own")


def check_keys(values: Mapping[str, Any], understood: Collection[str], place: str) -> None:
    """Refuse what would be dropped: keys that nothing reads, unless they are null.

    Raises:
        ArtifactError: that names the first.
    """
    for key, value in values.items():
        if key not in understood and value is not None:
            allowed = ", ".join(sorted(understood))
            raise ArtifactError(f"{place}: nothing reads the key {key!r}; allowed are {allowed}; rename or remove it")


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(file for file in path.glob("*.jsonl") if not file.name.startswith("."))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or ("none" if path.is_dir() else "no such file or directory")
        raise ArtifactError(f"{path} must be a .jsonl file or a directory that holds exactly one; found {names}")
    return files[0]


def _read_row(line: bytes, place: str) -> Row:
    try:
        values = parse_json(line, place)
    except ArtifactError as broken:
        raise ArtifactError(f"{broken}; a row is one JSON object on one line") from broken
    if not isinstance(values, dict):
        raise ArtifactError(f"{place} must be a JSON object, found {type(values).__name__}")
    return Row(values, place)

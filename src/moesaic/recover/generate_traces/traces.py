"""Traces: replies of the parent, token by token, to distil from (paper A, section on recovery).

A data set is JSON lines, one trace each: ``{"id", "task", "effort", "prompt_ids", "reply_ids", "correct", "truncated",
"held_out"}``. A trace of n tokens takes n - 1 places of a row: nothing is predicted from its last token.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.data.datasets import Row, check_keys, iterate_rows

_EFFORTS = get_args(Effort)


@dataclass(frozen=True)
class Trace:
    """One reply of the parent to a prompt."""

    id: str
    """The problem's."""
    task: str
    effort: str
    prompt_ids: tuple[int, ...]
    """What the chat template made of the prompt."""
    reply_ids: tuple[int, ...]
    """What the parent generated, its stop token included unless ``truncated``."""
    correct: bool
    truncated: bool
    held_out: bool
    """Never trained on; the same at all efforts of a prompt."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and reply."""
        return self.prompt_ids + self.reply_ids

    @property
    def num_positions(self) -> int:
        """Places it takes in a row."""
        return len(self.prompt_ids) + len(self.reply_ids) - 1

    def to_json(self) -> str:
        """Its line of a data set, without the line's end."""
        return json.dumps(asdict(self), separators=(",", ":"))


def read_traces(path: Path) -> list[Trace]:
    """All traces of a data set, see :func:`iterate_traces`."""
    return list(iterate_traces(path))


def iterate_traces(path: Path) -> Iterator[Trace]:
    """The traces of a data set: a ``.jsonl`` file, or a directory that holds exactly one.

    Raises:
        ArtifactError: if it is missing, empty, a line is not a trace, or a prompt is held out in one line and trained
            on in another; the message names the line.
    """
    held_out: dict[str, bool] = {}
    for row in iterate_rows(path):
        trace = _parse_trace(row)
        if held_out.setdefault(trace.id, trace.held_out) != trace.held_out:
            raise ArtifactError(
                f"{row.place}: 'held_out' is {trace.held_out}, but an earlier trace of the prompt {trace.id!r} says "
                f"otherwise; a prompt is held out at all efforts or at none"
            )
        yield trace


def _parse_trace(row: Row) -> Trace:
    entry = row.values
    check_keys(entry, [field.name for field in fields(Trace)], row.place)
    _check(row, ("id", "task"), lambda value: isinstance(value, str), "text")
    _check(row, ("effort",), lambda value: value in _EFFORTS, f"one of {', '.join(_EFFORTS)}")
    _check(row, ("prompt_ids", "reply_ids"), _are_token_ids, "a list of token ids that is not empty")
    _check(row, ("correct", "truncated", "held_out"), lambda value: isinstance(value, bool), "true or false")
    return Trace(
        id=entry["id"],
        task=entry["task"],
        effort=entry["effort"],
        prompt_ids=tuple(entry["prompt_ids"]),
        reply_ids=tuple(entry["reply_ids"]),
        correct=entry["correct"],
        truncated=entry["truncated"],
        held_out=entry["held_out"],
    )


def _check(row: Row, keys: Iterable[str], is_valid: Callable[[Any], bool], allowed: str) -> None:
    for key in keys:
        if not is_valid(row.values.get(key)):
            raise ArtifactError(f"{row.place}: {key!r} must be {allowed}, found {row.values.get(key)!r:.100}")


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)

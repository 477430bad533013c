"""Traces: replies of the parent, token by token, packed into long rows for distillation (paper A, section on recovery).

A data set is JSON lines, one trace each: ``{"id", "task", "effort", "prompt_ids", "reply_ids", "correct", "truncated",
"held_out"}``. A row of a batch holds several traces one after another; positions restart at 0 at each, by which the
attention keeps them apart. A trace of n tokens takes n - 1 places: nothing is predicted from its last token.
"""

import json
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.data.datasets import Row, read_rows

IGNORED = -100
"""The label where nothing is learned, as PyTorch's cross entropy has it."""

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


@dataclass(frozen=True)
class PackedRow:
    """Traces that stand one after another in a row of a batch."""

    traces: tuple[Trace, ...]

    @property
    def num_positions(self) -> int:
        """Places its traces take."""
        return sum(trace.num_positions for trace in self.traces)


@dataclass(frozen=True)
class PackedBatch:
    """Rows as tensors of one length; padding is a document of its own that nobody learns from."""

    input_ids: Int[Tensor, "batch token"]
    position_ids: Int[Tensor, "batch token"]
    """Restart at 0 at every trace and at the padding."""
    labels: Int[Tensor, "batch token"]
    """The token that follows where that is the parent's reply: the predictions that are trained. Elsewhere IGNORED."""
    reply_share: Float[Tensor, "batch token"]
    """The share of its reply that a prediction is: those of one reply sum to 1; 0 where the label is IGNORED."""

    @property
    def responses(self) -> Int[Tensor, " response"]:
        """Where the labels are not IGNORED, as places in the flattened batch."""
        return (self.labels.flatten() != IGNORED).nonzero().squeeze(1)


def read_traces(path: Path) -> list[Trace]:
    """Read a data set: a ``.jsonl`` file, or a directory that holds exactly one.

    Raises:
        ArtifactError: if it is missing, empty, a line is not a trace, or a prompt is held out in one line and trained
            on in another; the message names the line.
    """
    traces: list[Trace] = []
    held_out: dict[str, bool] = {}
    for row in read_rows(path):
        trace = _parse_trace(row)
        if held_out.setdefault(trace.id, trace.held_out) != trace.held_out:
            raise ArtifactError(
                f"{row.place}: 'held_out' is {trace.held_out}, but an earlier trace of the prompt {trace.id!r} says "
                f"otherwise; a prompt is held out at all efforts or at none"
            )
        traces.append(trace)
    return traces


def _parse_trace(row: Row) -> Trace:
    entry = row.values
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


def pack_traces(traces: Sequence[Trace], sequence_tokens: int, seed: int) -> list[PackedRow]:
    """Fill rows of ``sequence_tokens`` places, longest traces first, each into the fullest row that has room for it.

    Those longer than a row are in none, so ``len(traces)`` less the traces of all rows is how many were left out.

    Args:
        traces: all of one kind, such as those to train on.
        sequence_tokens: places of a row.
        seed: draws the order of traces of equal length, which a data set often has sorted by task.

    Raises:
        ArtifactError: if there are traces but none fits.
    """
    order = list(traces)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda trace: -trace.num_positions)
    if order and order[-1].num_positions > sequence_tokens:
        raise ArtifactError(
            f"none of the {len(order)} traces fits a row of {sequence_tokens} tokens, the shortest takes "
            f"{order[-1].num_positions}; raise sequence_tokens or use traces of a lower effort"
        )
    rows: list[list[Trace]] = []
    spare: list[tuple[int, int]] = []  # places left and number of every row that has some, fullest row first
    for trace in order:
        length = trace.num_positions
        if length > sequence_tokens:
            continue
        fullest = bisect_left(spare, (length, 0))
        left, row = spare.pop(fullest) if fullest < len(spare) else (sequence_tokens, len(rows))
        rows.extend([[]] if row == len(rows) else [])
        rows[row].append(trace)
        if left > length:
            insort(spare, (left - length, row))
    return [PackedRow(tuple(row)) for row in rows]


def make_batch(rows: Sequence[PackedRow], num_places: int) -> PackedBatch:
    """The tensors of a few rows of ``num_places`` places."""
    input_ids = torch.zeros(len(rows), num_places, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    reply_share = torch.zeros(len(rows), num_places)
    for number, row in enumerate(rows):
        start = 0
        for trace in row.traces:
            stop = start + trace.num_positions
            ids = torch.tensor(trace.token_ids)
            first_reply = len(trace.prompt_ids)
            input_ids[number, start:stop] = ids[:-1]
            position_ids[number, start:stop] = torch.arange(trace.num_positions)
            labels[number, start + first_reply - 1 : stop] = ids[first_reply:]
            reply_share[number, start + first_reply - 1 : stop] = 1 / len(trace.reply_ids)
            start = stop
        position_ids[number, start:] = torch.arange(num_places - start)
    return PackedBatch(input_ids, position_ids, labels, reply_share)


def rows_of_step(num_rows: int, rows_per_step: int, step: int, seed: int) -> list[int]:
    """The rows of optimiser step ``step`` (from 0), whatever was run before.

    Every epoch visits each row once, in an order drawn from the seed and the epoch; a step may continue into the next.
    """
    places = range(step * rows_per_step, (step + 1) * rows_per_step)
    return [_epoch_order(num_rows, seed, place // num_rows)[place % num_rows] for place in places]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)

"""Rows of traces, one behind the other, and the order in which steps take them.

Positions restart at 0 at every trace, by which the attention keeps traces apart; no token then sees more than its own
trace, however long the row. With ``context`` "row" they run on, and every reply has all that stands before it in the
row as its context, up to the row's length. Parent and child see the same, so the distillation is as valid.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.recover.distill.stage import Context
from moesaic.recover.distill.trace_table import TraceTable

IGNORED = -100
"""The label where nothing is learned, as PyTorch's cross entropy has it."""


@dataclass(frozen=True)
class PackedBatch:
    """Rows as tensors of one length; padding is a document of its own that nobody learns from."""

    input_ids: Int[Tensor, "batch token"]
    position_ids: Int[Tensor, "batch token"]
    """Restart at 0 at every document."""
    labels: Int[Tensor, "batch token"]
    """The token that follows where that is the parent's reply: the predictions that are trained. Elsewhere IGNORED."""
    reply_share: Float[Tensor, "batch token"]
    """The share of its reply that a prediction is: those of one reply sum to 1; 0 where the label is IGNORED."""

    @property
    def responses(self) -> Int[Tensor, " response"]:
        """Where the labels are not IGNORED, as places in the flattened batch."""
        return (self.labels.flatten() != IGNORED).nonzero().squeeze(1)


def pack(num_places: Sequence[int], sequence_tokens: int, seed: int) -> list[list[int]]:
    """Fill rows of ``sequence_tokens`` places, longest traces first, each into the fullest row that has room for it.

    Args:
        num_places: what each trace takes; those longer than a row are in none.
        sequence_tokens: places of a row.
        seed: draws the order of traces of equal length, which a data set often has sorted by task.

    Returns:
        The traces of each row, by their place in ``num_places``.

    Raises:
        ArtifactError: if there are traces but none fits.
    """
    order = list(range(len(num_places)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda trace: -num_places[trace])
    if order and num_places[order[-1]] > sequence_tokens:
        raise ArtifactError(
            f"none of the {len(order)} traces fits a row of {sequence_tokens} tokens, the shortest takes "
            f"{num_places[order[-1]]}; raise sequence_tokens or use traces of a lower effort"
        )
    rows: list[list[int]] = []
    spare: list[tuple[int, int]] = []  # places left and number of every row that has some, fullest row first
    for trace in order:
        length = num_places[trace]
        if length > sequence_tokens:
            continue
        fullest = bisect_left(spare, (length, 0))
        left, row = spare.pop(fullest) if fullest < len(spare) else (sequence_tokens, len(rows))
        rows.extend([[]] if row == len(rows) else [])
        rows[row].append(trace)
        if left > length:
            insort(spare, (left - length, row))
    return rows


def make_batch(
    table: TraceTable, rows: Sequence[Sequence[int]], num_places: int, context: Context = "trace"
) -> PackedBatch:
    """The tensors of a few rows.

    Args:
        table: the traces.
        rows: their numbers, row by row.
        num_places: places of a row.
        context: how far a token sees, see above.
    """
    shape = len(rows), num_places
    input_ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    starts, shares = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    for number, row in enumerate(rows):
        start = 0
        for trace in row:
            ids, num_prompt = table.tokens(trace)
            stop, first = start + len(ids) - 1, start + num_prompt - 1
            input_ids[number, start:stop] = ids[:-1]
            labels[number, first:stop] = ids[num_prompt:]
            shares[number, first:stop] = 1 / (stop - first)
            starts[number, start:stop] = start
            start = stop
        starts[number, start:] = start
    positions = np.arange(num_places) - (starts if context == "trace" else np.zeros_like(starts))
    return PackedBatch(*map(torch.from_numpy, (input_ids, positions, labels, shares)))


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

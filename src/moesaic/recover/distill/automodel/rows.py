"""The rows of a run, in the order in which steps take them, for AutoModel's data loader.

Item ``step * rows_per_step + i`` is row i of that step. The loader gives rank r of n every n-th item from r on, so that
the ranks together take exactly the rows of each step, however many they are, and its place in the order is a number
that a checkpoint can hold.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.generate_traces.traces import (
    PackedBatch,
    PackedRow,
    Trace,
    make_batch,
    pack_traces,
    read_traces,
    rows_of_step,
)


class TrainingRows(Dataset[PackedBatch]):
    """The rows of all steps; each is as often in it as it is trained on."""

    def __init__(self, traces: str, config: Mapping[str, Any]) -> None:
        self.config = DistillConfig.model_validate(_plain(config))
        self.rows = pack(chosen_traces(Path(traces), self.config.efforts, held_out=False), self.config)

    def __len__(self) -> int:
        return self.config.steps * self.config.rows_per_step

    def __getitem__(self, item: int) -> PackedBatch:
        step, place = divmod(item, self.config.rows_per_step)
        row = self.rows[rows_of_step(len(self.rows), self.config.rows_per_step, step, self.config.seed)[place]]
        return make_batch([row], self.config.sequence_tokens)


def held_out_rows(traces: Path, config: DistillConfig) -> list[PackedBatch]:
    """The rows to evaluate on."""
    rows = pack(chosen_traces(traces, config.efforts, held_out=True), config)
    return [make_batch([row], config.sequence_tokens) for row in rows]


def chosen_traces(path: Path, efforts: tuple[str, ...], held_out: bool) -> list[Trace]:
    """The traces of these efforts that are held out, or those that are not."""
    return [trace for trace in _read_once(path) if trace.effort in efforts and trace.held_out == held_out]


def pack(traces: Sequence[Trace], config: DistillConfig) -> list[PackedRow]:
    """Rows as the config has them."""
    return pack_traces(traces, config.sequence_tokens, config.seed)


def collate(rows: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """Rows as one batch, under the names of AutoModel's loop."""
    names = ("input_ids", "position_ids", "labels", "reply_share")
    batch = PackedBatch(*(torch.cat([getattr(row, name) for row in rows]) for name in names))
    return {name: getattr(batch, name) for name in (*names, "responses")}


@lru_cache(maxsize=1)
def _read_once(path: Path) -> list[Trace]:
    return read_traces(path)


def _plain(config: Any) -> dict[str, Any]:
    """AutoModel hands sections of its YAML on as nodes of its own."""
    plain: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return plain

"""The rows of a run, in the order in which steps take them, for AutoModel's data loader.

Item ``step * rows_per_step + i`` is row i of that step. The loader gives rank r of n every n-th item from r on, so that
the ranks together take exactly the rows of each step, however many they are, and its place in the order is a number
that a checkpoint can hold.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moesaic.recover.distill.packing import PackedBatch, make_batch, pack, rows_of_step
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.distill.trace_table import TraceTable


class Rows(Dataset[PackedBatch]):
    """The rows to train on or, ``held_out``, to evaluate on; each is read when it is asked for."""

    def __init__(self, table: TraceTable, config: DistillConfig, held_out: bool) -> None:
        self._table, self._config = table, config
        self._traces = table.chosen(config.efforts, held_out)
        places = table.num_places(self._traces).tolist()
        self._rows = pack(places, config.sequence_tokens, config.seed)

    @property
    def num_left_out(self) -> int:
        """Traces that are longer than a row."""
        return len(self._traces) - sum(map(len, self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> PackedBatch:
        row = self._traces[self._rows[number]].tolist()
        return make_batch(self._table, [row], self._config.sequence_tokens, self._config.context)


class TrainingRows(Dataset[PackedBatch]):
    """The rows of all steps; each is as often in it as it is trained on."""

    def __init__(self, traces: str, config: Mapping[str, Any]) -> None:
        self._config = DistillConfig.model_validate(_plain(config))
        self.rows = Rows(TraceTable(Path(traces)), self._config, held_out=False)

    def __len__(self) -> int:
        return self._config.steps * self._config.rows_per_step

    def __getitem__(self, item: int) -> PackedBatch:
        size = self._config.rows_per_step
        step, place = divmod(item, size)
        return self.rows[rows_of_step(len(self.rows), size, step, self._config.seed)[place]]


def collate(rows: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """Rows as one batch, under the names of AutoModel's loop."""
    names = ("input_ids", "position_ids", "labels", "reply_share")
    batch = PackedBatch(*(torch.cat([getattr(row, name) for row in rows]) for name in names))
    return {name: getattr(batch, name) for name in (*names, "responses")}


def _plain(config: Any) -> dict[str, Any]:
    """AutoModel hands sections of its YAML on as nodes of its own."""
    plain: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return plain

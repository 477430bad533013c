"""The processes of a run, which sum their gradients and share the optimiser's work."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
PATIENCE = timedelta(days=2)
"""A process waits this long for another one: a run may be stopped and continued."""


@dataclass(frozen=True)
class Workers:
    """How many processes there are, and which of them this is; one alone needs no communication."""

    rank: int = 0
    count: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def merge(self, values: dict[int, Value]) -> list[Value]:
        """The values of all processes, in the order of their keys."""
        parts: list[dict[int, Value]] = [values]
        if self.count > 1:
            parts = [{} for _ in range(self.count)]
            dist.all_gather_object(parts, values)
        merged = {key: value for part in parts for key, value in part.items()}
        return [merged[key] for key in sorted(merged)]


def connect(rank: int, count: int, meeting: Path) -> Workers:
    """Join the other processes through a file that none of them has used before."""
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=count, timeout=PATIENCE
        )
    return Workers(rank, count)

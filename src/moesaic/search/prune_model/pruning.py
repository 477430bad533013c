"""Cutting a child's block out of its parent's (paper A: experts are removed; training comes later).

A child layer with ``n`` experts keeps the ``n`` best of the layer's ranking, in their original order. Every tensor
whose first axis counts experts (packed weights, their scales and biases, router rows) loses the other rows; nothing is
unpacked, so a kept expert's bytes are its parent's. Windows change no tensor at all.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.models import gpt_oss


class Rows(Protocol):
    """What has rows: a tensor in memory, or one still in its file."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def index_select(self, dim: int, index: Tensor) -> Self:
        """Some of them, along axis ``dim``, which is 0."""
        ...


T = TypeVar("T", bound=Rows)


def kept_experts(order: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """The first ``num_experts`` of a ranking, by ascending id so that an unpruned layer comes out unchanged."""
    if not 1 <= num_experts <= len(order):
        raise ConfigError(f"cannot keep {num_experts} of {len(order)} ranked experts; keep 1 to {len(order)}")
    return tuple(sorted(order[:num_experts]))


def prune_layer(tensors: Mapping[str, T], kept: Sequence[int]) -> dict[str, T]:
    """One layer's tensors as stored, without the experts that are not ``kept``."""
    rows = torch.tensor(kept)
    return {
        name: tensor.index_select(0, rows) if gpt_oss.is_expert_indexed(name) and len(kept) < len(tensor) else tensor
        for name, tensor in tensors.items()
    }

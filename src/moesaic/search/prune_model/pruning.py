"""Cutting a child's block out of its parent's (paper A: experts are removed; training comes later).

A child layer with ``n`` experts keeps the ``n`` best of the layer's ranking, in their original order. Every tensor
whose first axis counts experts (packed weights, their scales and biases, router rows) loses the other rows; where
experts have tensors of their own, the others' go and the rest are numbered anew. Nothing is unpacked, so a kept
expert's bytes are its parent's. Windows change no tensor at all.

A narrower expert keeps the best channels of its own ranking, in their original order. Its first projection loses rows,
whose bytes stay the parent's. Its second one loses columns, of which MXFP4 gives 32 in a row one scale: the kept ones
are packed anew, and those that get a larger scale than they had are rounded.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.models import layout, mxfp4


class Rows(Protocol):
    """What has rows: a tensor in memory, or one still in its file."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def index_select(self, dim: int, index: Tensor) -> Self:
        """Some of them, along axis ``dim``, which is 0."""
        ...


class StoredRows(Rows, Protocol):
    """Rows that are still in their file."""

    def read(self) -> Tensor:
        """All of them, in memory."""
        ...


T = TypeVar("T", bound=Rows)
Stored = TypeVar("Stored", bound=StoredRows)


def kept_experts(order: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """The first ``num_experts`` of a ranking, by ascending id so that an unpruned layer comes out unchanged.

    A layer without experts keeps none.
    """
    if not min(1, len(order)) <= num_experts <= len(order):
        raise ConfigError(f"cannot keep {num_experts} of {len(order)} ranked experts; keep 1 to {len(order)}")
    return tuple(sorted(order[:num_experts]))


def prune_layer(tensors: Mapping[str, T], kept: Sequence[int]) -> dict[str, T]:
    """One layer's tensors as stored, without the experts that are not ``kept``."""
    rows, places = torch.tensor(kept), {expert: place for place, expert in enumerate(kept)}
    pruned = {}
    for name, tensor in tensors.items():
        expert = layout.expert_number(name)
        if expert in places:
            pruned[layout.renumbered(name, places[expert])] = tensor
        elif expert is None:
            cut = layout.is_expert_indexed(name) and len(kept) < len(tensor)
            pruned[name] = tensor.index_select(0, rows) if cut else tensor
    return pruned


def prune_stored(
    tensors: Mapping[str, Stored], kept: Sequence[int], channels: Int[Tensor, "kept_expert kept_channel"] | None
) -> tuple[dict[str, Stored | Tensor], float]:
    """One layer's tensors as stored, with the experts that are ``kept`` and these channels of each (None: all).

    Only where channels go are the experts read.

    Returns:
        The tensors, and what packing anew lost, see :func:`narrow_experts`.
    """
    pruned = prune_layer(tensors, kept)
    if channels is None:
        return dict(pruned), 0.0
    experts = {name: stored.read() for name, stored in pruned.items() if layout.is_expert_weight(name)}
    narrowed, lost = narrow_experts(experts, channels)
    return {**pruned, **narrowed}, lost


def kept_channels(orders: Int[Tensor, "expert channel"], expert_width: int) -> Int[Tensor, "expert kept_channel"]:
    """The first ``expert_width`` channels of every expert's ranking, by ascending id."""
    if not 1 <= expert_width <= orders.shape[1]:
        raise ConfigError(
            f"cannot keep {expert_width} of {orders.shape[1]} ranked channels; keep 1 to {orders.shape[1]}"
        )
    return orders[:, :expert_width].sort(-1).values


def narrow_experts(
    tensors: Mapping[str, Tensor], channels: Int[Tensor, "expert kept_channel"]
) -> tuple[dict[str, Tensor], float]:
    """One layer's expert tensors as stored, with these channels of each expert only.

    Returns:
        The tensors, and what packing anew lost of the second projection: the squared error over its squares.
    """
    each, narrowed, lost = torch.arange(len(channels)).unsqueeze(1), dict(tensors), 0.0
    for name, tensor in tensors.items():
        if (expert := layout.expert_number(name)) is not None:
            narrowed[name] = tensor[:, channels[expert]] if ".down_proj" in name else tensor[channels[expert]]
        elif name.endswith("gate_up_proj"):
            narrowed[name] = _pairs(tensor.transpose(1, 2), each, channels).transpose(1, 2)
        elif ".gate_up_proj" in name:
            narrowed[name] = _pairs(tensor, each, channels)
        elif name.endswith("down_proj"):
            narrowed[name] = tensor[each, channels]
        elif name.endswith("down_proj_blocks"):
            scales_name = f"{name.removesuffix('_blocks')}_scales"
            narrowed[name], narrowed[scales_name], lost = repack(tensor, tensors[scales_name], channels)
    return narrowed, lost


def _pairs(rows: Tensor, each: Tensor, channels: Tensor) -> Tensor:
    """Of rows by expert those of some channels; gate and up of a channel are neighbours."""
    pairs: Tensor = rows.unflatten(1, (-1, 2))[each, channels]
    return pairs.flatten(1, 2)


def repack(
    blocks: UInt8[Tensor, "expert row block 16"],
    scales: UInt8[Tensor, "expert row block"],
    channels: Int[Tensor, "expert kept_channel"],
) -> tuple[UInt8[Tensor, "expert row kept_block 16"], UInt8[Tensor, "expert row kept_block"], float]:
    """MXFP4 weights with these columns of each expert only, packed anew; one expert at a time is unpacked.

    Returns:
        Blocks, scales, and the squared error of what was kept over its squares.
    """
    packed, error, size = [], 0.0, 0.0
    for expert, kept in enumerate(channels):
        weight: Float[Tensor, "row column"] = mxfp4.dequantize(blocks[expert], scales[expert])[:, kept]
        packed.append(mxfp4.quantize(weight))
        error += float((mxfp4.dequantize(*packed[-1]) - weight).double().square().sum())
        size += float(weight.double().square().sum())
    new_blocks, new_scales = (torch.stack(parts) for parts in zip(*packed, strict=True))
    return new_blocks, new_scales, error / size if size else 0.0

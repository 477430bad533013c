"""gpt-oss attention for training on accelerators: FlexAttention with sinks, windows and packed documents.

The same attention as ``moesaic.models.attention`` defines: query i sees the keys ``first[i] <= j <= i``, where
``first[i]`` is where its window or, if that is later, its document begins. FlexAttention computes the softmax without
the sink, ``o`` and ``z = log sum_j exp(s[i, j])``; a sink of logit c only adds to the sum, so that::

    o_sink = o * exp(z) / (exp(z) + exp(c)) = o * sigmoid(z - c)

``first`` never decreases along a row, hence which tiles of keys a tile of queries sees follows from its first and last
query: the tile mask is computed from ``tokens / 128`` numbers and never from ``tokens * tokens``.

Departure from AutoModel's own FlexAttention: its mask knows no documents, is materialised for every head, and is kept
for the life of the process; ours is made once per forward pass and distinct window.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

TILE = 128
"""Queries, and keys, of one tile of the mask."""

_compiled_flex_attention: Any = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")


def runs_flex_attention(device: torch.device) -> bool:
    """Everywhere but on CPUs, where FlexAttention has no backward pass."""
    return device.type != "cpu"


def first_keys(
    num_tokens: int, window: int | None, documents: Int[Tensor, "batch token"] | None, device: torch.device
) -> Int[Tensor, "rows token"]:
    """The first key each query sees: its window's or its document's, whichever is later."""
    index = torch.arange(num_tokens, device=device)
    start = torch.zeros_like(index) if window is None else (index - window + 1).clamp_min(0)
    return start.unsqueeze(0) if documents is None else torch.maximum(start, documents)


def tile_mask(first: Int[Tensor, "rows token"]) -> BlockMask:
    """FlexAttention's mask for queries that see the keys from ``first`` to themselves.

    A tile of keys is *full* for a tile of queries if every query sees every key of it, *partial* if some do.
    """
    num_tokens = first.shape[1]
    num_tiles = -(-num_tokens // TILE)
    starts = torch.arange(num_tiles, device=first.device) * TILE
    ends = (starts + TILE).clamp_max(num_tokens) - 1
    tile = torch.arange(num_tiles, device=first.device)
    before = tile < tile.unsqueeze(1)
    full = before & (starts >= first[:, ends].unsqueeze(-1))
    seen = (tile == tile.unsqueeze(1)) | (before & (ends >= first[:, starts].unsqueeze(-1)))
    counts, indices = _listed(seen & ~full)
    full_counts, full_indices = _listed(full)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[batch % first.shape[0], query])

    return BlockMask.from_kv_blocks(
        counts, indices, full_counts, full_indices, TILE, mask_mod=sees, seq_lengths=(num_tokens, num_tokens)
    )


def flex_sink_attention(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch kv_head token dim"],
    value: Float[Tensor, "batch kv_head token dim"],
    sinks: Float[Tensor, " head"],
    scale: float,
    mask: BlockMask,
) -> Float[Tensor, "batch head token dim"]:
    """Attention under ``mask`` with one sink per head; ``z`` and the sigmoid are float32."""
    output, extra = _compiled_flex_attention(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    share: Tensor = torch.sigmoid(extra.lse - sinks.float().view(1, -1, 1)).unsqueeze(-1)
    scaled: Tensor = (output * share).to(query.dtype)
    return scaled


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile has chosen, and all of them, the chosen ones first; one mask for all heads."""
    counts = chosen.sum(-1, dtype=torch.int32).unsqueeze(1)
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return counts, order.to(torch.int32).unsqueeze(1)

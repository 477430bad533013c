"""Attention, with sinks or without, in bounded memory, under the name ``moesaic`` in transformers' attention interface.

gpt-oss gives every head a learned *sink*: a logit ``c`` that takes part in the softmax and has no value::

    p[i, j] = exp(s[i, j]) / (exp(c) + sum_j' exp(s[i, j'])),    s[i, j] = scale * q_i . k_j,    o_i = sum_j p[i, j] v_j

and other families none: a sink that weighs nothing. Sums are over the keys j that query i sees: ``i - window < j <= i``
(all ``j <= i`` without a window), not padding, and of the query's own document where several are packed into a row:
positions then restart at 0, so that query i's document begins at key ``i - position[i]``.

Queries are processed in chunks against only the keys the chunk can see, so that a window layer costs
``tokens * window`` and no layer ever holds ``tokens * tokens`` logits of all heads. Source: OpenAI's gpt-oss model
card; windows in place of full attention are the search dimension of paper A.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "moesaic"

_CHUNK = 64
"""Queries of one chunk, when a window does not ask for fewer."""
_SMALLEST_CHUNK = 16
_LOGITS = {"cpu": 2**19}
"""Logits held at once: what a core's second-level cache takes. Accelerators hold more."""
_LOGITS_ELSEWHERE = 2**26


def register() -> None:
    """Make ``attn_implementation="moesaic"`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """What transformers hands to the attention as its mask: which keys are tokens, or None if all are.

    Raises:
        ValueError: for a cache whose last entry is not the newest token, such as a static one.
    """
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ValueError("the moesaic attention needs a cache that grows with the sequence; static caches do not")
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:]
    return None if mask.all() else mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature transformers calls; see :func:`sink_attention`. A module's own window counts, too."""
    if dropout:
        raise ValueError("the moesaic attention knows no dropout")
    if s_aux is None:
        s_aux = query.new_full((query.shape[1],), torch.finfo(query.dtype).min)
    first_key = _first_keys(position_ids, key.shape[2]) if attention_mask is None else None
    window = getattr(module, "sliding_window", None) if sliding_window is None else sliding_window
    output = sink_attention(query, key, value, s_aux, scaling, window, attention_mask, first_key)
    return output.transpose(1, 2).contiguous(), None


def document_starts(positions: Int[Tensor, "batch token"]) -> Int[Tensor, "batch token"] | None:
    """For every token the index its document begins at; None if every row is one document.

    Documents packed into one row are told apart by their positions, which restart at 0.
    """
    if bool((positions.diff(dim=-1) == 1).all()):
        return None
    return torch.arange(positions.shape[1], device=positions.device) - positions


def _first_keys(positions: Tensor | None, num_keys: int) -> Tensor | None:
    """For every query the key its document begins at, where the last query is at the last key."""
    starts = None if positions is None else document_starts(positions)
    return None if positions is None or starts is None else starts + (num_keys - positions.shape[1])


def sink_attention(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    value: Float[Tensor, "batch kv_head key dim"],
    sinks: Float[Tensor, " head"],
    scale: float,
    window: int | None = None,
    is_token: Bool[Tensor, "batch key"] | None = None,
    first_key: Int[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head query dim"]:
    """Causal attention in which the last query is at the last key.

    Args:
        query: queries after RoPE; a multiple of ``kv_head`` heads, consecutive ones share a key head.
        key: keys after RoPE.
        value: values.
        sinks: the sink's logit of each head.
        scale: what dot products are multiplied by.
        window: how many keys a query sees, its own included; None for all.
        is_token: False where a key is padding; None if no key is.
        first_key: the first key that a query may see, where documents are packed into rows; None where they are not.
    """
    batch = query.shape[0]
    rows, step = _chunk_sizes(query, key.shape[2], window)
    parts = [
        [None] * -(-batch // rows) if tensor is None else tensor.split(rows)
        for tensor in (query * scale, key, value, is_token, None if first_key is None else first_key.expand(batch, -1))
    ]
    return torch.cat(
        [_attend_rows(q, k, v, sinks, step, window, mask, first) for q, k, v, mask, first in zip(*parts, strict=True)]
    )


def _chunk_sizes(query: Tensor, num_keys: int, window: int | None) -> tuple[int, int]:
    """Sequences and queries whose logits are held at once."""
    heads, num_queries = query.shape[1:3]
    limit = _LOGITS.get(query.device.type, _LOGITS_ELSEWHERE)
    step = _CHUNK if window is None else max(_SMALLEST_CHUNK, min(_CHUNK, window))
    visible = num_keys if window is None else min(num_keys, window + step)
    step = min(step, num_queries, max(_SMALLEST_CHUNK, limit // (heads * visible)))
    return max(1, limit // (heads * step * visible)), step


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    step: int,
    window: int | None,
    is_token: Tensor | None,
    first_key: Tensor | None,
) -> Tensor:
    offset = key.shape[2] - query.shape[2]
    outputs = []
    for start in range(0, query.shape[2], step):
        chunk = query[:, :, start : start + step]
        first, stop = offset + start, offset + start + chunk.shape[2]
        low = 0 if window is None else max(0, first - window + 1)
        starts = None if first_key is None else first_key[:, start : start + step]
        if starts is not None:
            low = max(low, int(starts.min()))
        bias = _visibility(range(first, stop), range(low, stop), window, is_token, starts, query)
        outputs.append(_attend_chunk(chunk, key[:, :, low:stop], value[:, :, low:stop], sinks, bias))
    return torch.cat(outputs, dim=2)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bias: Tensor) -> Tensor:
    """Softmax with the sink in its sum, in float32 or better; the sum divides the output, the smaller tensor."""
    batch, heads, num_queries, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[3])
    logits = (grouped @ key.transpose(-1, -2)).to(precision).view(batch, key.shape[1], -1, num_queries, key.shape[2])
    logits = logits + bias
    sink = sinks.to(precision).view(1, key.shape[1], -1, 1, 1)
    largest = torch.maximum(logits.detach().amax(-1, keepdim=True), sink.detach())
    weights = (logits - largest).exp_()
    total = weights.sum(-1, keepdim=True) + (sink - largest).exp()
    output = weights.to(value.dtype).view(*grouped.shape[:3], -1) @ value
    return (output.view(*total.shape[:4], -1) / total.to(value.dtype)).view(batch, heads, num_queries, -1)


def _visibility(
    queries: range, keys: range, window: int | None, is_token: Tensor | None, first_key: Tensor | None, like: Tensor
) -> Tensor:
    """0 where a query sees a key and -inf elsewhere, [batch or 1, 1, 1, query, key]."""
    position = torch.arange(queries.start, queries.stop, device=like.device).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop, device=like.device)
    seen = key <= position
    if window is not None:
        seen = seen & (key > position - window)
    seen = seen.view(1, 1, 1, *seen.shape)
    if is_token is not None:
        seen = seen & is_token[:, None, None, None, keys.start : keys.stop]
    if first_key is not None:
        seen = seen & (key >= first_key[:, None, None, :, None])
    return torch.zeros(seen.shape, device=like.device).masked_fill_(~seen, float("-inf"))

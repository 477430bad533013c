"""The next token of every row of a batch whose requests sample differently.

A row with temperature 0 takes its most likely token. Any other draws by inversion: with ``p = softmax(logits / T)``
sorted from the largest, the smallest set whose sum reaches ``top_p`` is kept, and a uniform number ``u`` in [0, 1)
picks the first token at which the running sum exceeds ``u`` times the sum of the kept. A row's token depends on its own
logits and its own ``u``, not on the rows beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one reply's tokens are chosen and when it ends."""

    max_tokens: int
    min_tokens: int = 0
    """Before as many, neither a stop token nor a stop text ends the reply; stop tokens are not even drawn."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: str = "0"
    """Replies with the same seed, prompt and parameters are the same."""
    stop_ids: frozenset[int] = frozenset()
    """None where the client asked to ignore the end of the reply."""


@dataclass(frozen=True)
class Draw:
    """Sampling parameters and uniform random number of one row at one step."""

    sampling: SamplingParams
    uniform: float
    """In [0, 1); ignored at temperature 0."""
    num_generated: int


def choose(logits: Float[Tensor, "batch vocab"], draws: Sequence[Draw]) -> Int[Tensor, " batch"]:
    """One token per row; sums are in float64."""
    logits = _without_early_stops(logits, draws)
    tokens = logits.argmax(-1)
    sampled = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        tokens[rows] = _invert(logits[rows], [draws[row] for row in sampled])
    return tokens


def _without_early_stops(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    early = [
        (row, token)
        for row, draw in enumerate(draws)
        if draw.num_generated < draw.sampling.min_tokens
        for token in draw.sampling.stop_ids
    ]
    if not early:
        return logits
    rows, tokens = torch.tensor(early, device=logits.device).unbind(-1)
    return logits.index_put((rows, tokens), logits.new_tensor(float("-inf")))


def _invert(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    exact = logits.double()
    exact = (exact - exact.amax(-1, keepdim=True)) / column([draw.sampling.temperature for draw in draws])
    weights, order = exact.softmax(-1).sort(dim=-1, descending=True, stable=True)
    sums = weights.cumsum(-1)
    kept = sums - weights < column([draw.sampling.top_p for draw in draws])
    total = (weights * kept).sum(-1, keepdim=True)
    place = (sums <= column([draw.uniform for draw in draws]) * total).sum(-1, keepdim=True)
    return order.gather(-1, place.clamp_max(kept.sum(-1, keepdim=True) - 1)).squeeze(-1)

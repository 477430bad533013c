"""Block-wise local distillation (paper B, its block library): each changed block alone learns its parent's block.

The child's block c of a layer gets what the parent's block p of that layer got (*teacher forcing*: x comes out of the
parent's own earlier layers), so that no block depends on how well another one learns, and all can learn at once::

    o_p = p(x),  o_c = c(x)
    loss = mse(o_p, o_c) / mse(o_p, 0) = sum ||o_c - o_p||^2 / sum ||o_p||^2

with sums over real tokens, padding left out. o is the block's whole output, what the residual stream carries on to the
next layer, so that the loss is on the scale of the damage that ``moesaic.search.score_blocks.scoring`` measures. Blocks
compute in their own precision; differences and sums are float32, over a held-out set float64.

Departure from paper B: experts do not learn, as in all of paper A's recovery; which other weights do is config.
"""

import random
from collections.abc import Iterator

from jaxtyping import Bool, Float
from torch import Tensor


def batch_order(num_batches: int, seed: int, steps: range) -> Iterator[int]:
    """The batch of every step: each pass over the data has an order of its own, which only seed and pass decide."""
    for step in steps:
        turn, place = divmod(step, num_batches)
        yield random.Random(f"{seed}/{turn}").sample(range(num_batches), num_batches)[place]


def error_and_energy(
    child: Float[Tensor, "batch token hidden"],
    parent: Float[Tensor, "batch token hidden"],
    is_token: Bool[Tensor, "batch token"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """``sum ||o_c - o_p||^2`` and ``sum ||o_p||^2`` over real tokens, in float32."""
    whole = parent[is_token].float()
    return (child[is_token].float() - whole).square().sum(), whole.square().sum()


def block_loss(
    child: Float[Tensor, "batch token hidden"],
    parent: Float[Tensor, "batch token hidden"],
    is_token: Bool[Tensor, "batch token"],
) -> Float[Tensor, ""]:
    """``mse(o_p, o_c) / mse(o_p, 0)`` of one batch."""
    error, energy = error_and_energy(child, parent, is_token)
    return error / energy

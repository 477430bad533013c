"""The order in which an expert's channels matter (arXiv 2607.04371 searches widths; these formulas are ours).

A channel c of expert e is what one gate, one up and one row d_c of the second projection make together. With w_t the
weight that token t gives the expert, and a_tc what goes into the second projection, leaving the channel out changes the
layer's output by ``w_t a_tc d_c``. Sums are over the tokens that are routed to e, in float64:

``output_energy`` (default)
    score_c = sum_t (w_t a_tc)^2 * ||d_c||^2: exactly the squared change of the layer's output, over all tokens, when
    this channel alone is left out. What several change together differs by their cross terms.
``activation``
    score_c = sum_t (w_t a_tc)^2.
``weight``
    score_c = ||d_c||^2, which looks at no token.
``random``
    The baseline: a seeded shuffle.

Of equals, as in an expert that no token is routed to, the lower id comes first.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.search.rank_experts.stage import ChannelCriterion


def order_channels(
    criterion: ChannelCriterion,
    energies: Float[Tensor, "expert channel"],
    norms: Float[Tensor, "expert channel"],
    seed: int,
) -> Int[Tensor, "expert channel"]:
    """Channel ids of every expert, most important first.

    Args:
        criterion: see above.
        energies: sums of ``(w a)^2``.
        norms: ``||d||^2``.
        seed: for the random criterion.
    """
    if criterion == "random":
        num_experts, expert_width = energies.shape
        return shuffle_channels(num_experts, expert_width, seed)
    scores = {"output_energy": energies * norms, "activation": energies, "weight": norms}[criterion]
    return _ordered(scores)


def shuffle_channels(num_experts: int, expert_width: int, seed: int) -> Int[Tensor, "expert channel"]:
    """Orders that depend on the seed alone."""
    return _ordered(torch.rand(num_experts, expert_width, generator=torch.Generator().manual_seed(seed)))


def _ordered(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

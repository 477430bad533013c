"""How far a changed model is from its parent on measured tokens (paper B, its block scores).

With h the parent's final-norm hidden state at a measured token, h' the child's, p and p' their next-token
distributions, t the token that follows and w the token's weight::

    hidden_mse = sum w ||h' - h||^2 / sum w ||h||^2       (activation MSE over the parent's energy; the default)
    kl         = sum w KL(p || p') / sum w                (nats; paper B's best)
    lm_loss    = sum w (log p[t] - log p'[t]) / sum w     (nats; the increase over the parent's loss)
    cosine     = sum w (1 - cos(h, h')) / sum w
    top1       = sum w [likeliest next token differs] / sum w

w is 1 with the balance ``token``. With ``trace`` it is 1 / the measured tokens of its sequence, so that every sequence
weighs 1: replies at low effort are a tenth as long as others and would hardly count. Departure: paper B weighs tokens.
On the tiny reasoner children found with ``trace`` are 4.9 points [3.7, 6.1] ahead at low effort before any training
(``benchmarks/score_balance.py``).

All are 0 for the parent itself: each compares with the parent on the very same tokens, which is what brings damages of
different token sets to one scale. Hidden states and distributions are float32, sums over tokens float64.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.models.layers import Head
from moesaic.models.layout import COMPARED_LOGITS
from moesaic.search.damage_config import DamageMetric

METRICS: tuple[DamageMetric, ...] = ("hidden_mse", "kl", "lm_loss", "cosine", "top1")
NUM_SUMS = len(METRICS) + 2
"""One sum per metric, then the parent's energy w ||h||^2 and the weights w."""

Metrics = dict[str, float]


def compare(
    head: Head,
    parent: Float[Tensor, "token hidden"],
    children: Float[Tensor, "variant token hidden"],
    next_ids: Int[Tensor, " token"],
    weights: Float[Tensor, " token"],
) -> Float[Tensor, "variant sum"]:
    """Weighted sums over tokens, for several children of one parent; ``finish`` makes metrics of them.

    Args:
        head: the output head both sides share.
        parent: the parent's final-norm hidden states.
        children: each child's, at the same tokens.
        next_ids: the tokens that follow.
        weights: of the tokens, in float64.
    """
    device = head.weight.device
    sums = torch.zeros(children.shape[0], NUM_SUMS, dtype=torch.float64)
    step = max(1, COMPARED_LOGITS // (head.weight.shape[0] * children.shape[0]))
    for start in range(0, parent.shape[0], step):
        rows = slice(start, start + step)
        chunk = parent[rows].to(device), children[:, rows].to(device), next_ids[rows].to(device)
        sums += _compare_chunk(head, *chunk).cpu() @ weights[rows]
    return sums


def _compare_chunk(
    head: Head,
    parent: Float[Tensor, "token hidden"],
    children: Float[Tensor, "variant token hidden"],
    next_ids: Int[Tensor, " token"],
) -> Float[Tensor, "variant sum token"]:
    """What each token adds to each sum, if its weight is 1."""
    error = (children - parent).double().square().sum(-1)
    cosine = 1 - F.cosine_similarity(children.double(), parent.double(), dim=-1)
    log_p, log_q = head.logits(parent).log_softmax(-1), head.logits(children).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).double().sum(-1)
    index = next_ids.view(1, -1, 1).expand(children.shape[0], -1, 1)
    loss = (log_p.unsqueeze(0).expand_as(log_q).gather(2, index) - log_q.gather(2, index)).double().squeeze(2)
    disagreement = (log_q.argmax(-1) != log_p.argmax(-1)).double()
    energy = parent.double().square().sum(-1).expand_as(error)
    return torch.stack((error, divergence, loss, cosine, disagreement, energy, torch.ones_like(error)), dim=1)


def unchanged(parent: Float[Tensor, "token hidden"], weights: Float[Tensor, " token"]) -> Float[Tensor, " sum"]:
    """The sums of a child that equals its parent."""
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
    sums[-2], sums[-1] = parent.double().square().sum(-1).cpu() @ weights, weights.sum()
    return sums


def finish(sums: Float[Tensor, " sum"]) -> Metrics:
    """The metrics of sums over all tokens."""
    *totals, energy, weight = sums.tolist()
    means = {metric: total / weight for metric, total in zip(METRICS, totals, strict=True)}
    return means | {"hidden_mse": totals[0] / energy}

"""How far a changed model is from its parent on measured tokens (paper B, its block scores).

With h the parent's final-norm hidden state at a measured token, h' the child's, p and p' their next-token distributions
and t the token that follows::

    hidden_mse = sum ||h' - h||^2 / sum ||h||^2     (mse(child, parent) / mse(parent, 0); activation MSE, the default)
    kl         = mean KL(p || p')                   (nats; paper B's best)
    lm_loss    = mean (log p[t] - log p'[t])        (nats; the increase over the parent's loss)
    cosine     = mean (1 - cos(h, h'))
    top1       = share of tokens whose likeliest next token differs

All are 0 for the parent itself: each compares with the parent on the very same tokens, which is what brings damages of
different token sets to one scale. Hidden states and distributions are float32, sums over tokens float64.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.models.layers import Head
from moesaic.search.score_blocks.stage import DamageMetric

METRICS: tuple[DamageMetric, ...] = ("hidden_mse", "kl", "lm_loss", "cosine", "top1")
NUM_SUMS = len(METRICS) + 2
"""One sum per metric, then the parent's energy ||h||^2 and the number of tokens."""

_LOGITS = 2**22
"""Next-token logits held at once of each model."""

Metrics = dict[str, float]


def compare(
    head: Head,
    parent: Float[Tensor, "token hidden"],
    children: Float[Tensor, "variant token hidden"],
    next_ids: Int[Tensor, " token"],
) -> Float[Tensor, "variant sum"]:
    """Sums over tokens, for several children of one parent; ``finish`` makes metrics of them.

    Args:
        head: the output head both sides share.
        parent: the parent's final-norm hidden states.
        children: each child's, at the same tokens.
        next_ids: the tokens that follow.
    """
    device = head.weight.device
    sums = torch.zeros(children.shape[0], NUM_SUMS, dtype=torch.float64)
    step = max(1, _LOGITS // (head.weight.shape[0] * children.shape[0]))
    for start in range(0, parent.shape[0], step):
        rows = slice(start, start + step)
        part = _compare_chunk(head, parent[rows].to(device), children[:, rows].to(device), next_ids[rows].to(device))
        sums += part.cpu()
    return sums


def _compare_chunk(head: Head, parent: Tensor, children: Tensor, next_ids: Tensor) -> Tensor:
    energy = parent.double().square().sum().expand(children.shape[0])
    error = (children - parent).double().square().sum((1, 2))
    cosine = 1 - F.cosine_similarity(children.double(), parent.double(), dim=-1)
    log_p, log_q = head.logits(parent).log_softmax(-1), head.logits(children).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).double().sum((1, 2))
    index = next_ids.view(1, -1, 1).expand(children.shape[0], -1, 1)
    loss = (log_p.unsqueeze(0).expand_as(log_q).gather(2, index) - log_q.gather(2, index)).double().sum((1, 2))
    disagreement = (log_q.argmax(-1) != log_p.argmax(-1)).double().sum(1)
    tokens = torch.full_like(error, len(next_ids))
    return torch.stack((error, divergence, loss, cosine.sum(1), disagreement, energy, tokens), dim=1)


def unchanged(parent: Float[Tensor, "token hidden"]) -> Float[Tensor, " sum"]:
    """The sums of a child that equals its parent."""
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
    sums[-2], sums[-1] = parent.double().square().sum().cpu(), parent.shape[0]
    return sums


def finish(sums: Float[Tensor, " sum"]) -> Metrics:
    """The metrics of sums over all tokens."""
    *totals, energy, tokens = sums.tolist()
    means = {metric: total / tokens for metric, total in zip(METRICS, totals, strict=True)}
    return means | {"hidden_mse": totals[0] / energy}

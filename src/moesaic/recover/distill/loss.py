"""The loss of global knowledge distillation (paper A, section on recovery; the formula is paper B's).

For one response token, with h_l the hidden states after decoder layer l, p the next-token distribution, and the parent
fixed::

    loss = sum_l (1 - cos(h_child_l, h_parent_l)) + KL(p_parent || p_child)

Departures: the mean over layers takes the place of the sum, so that the balance of both terms does not depend on depth.
Each term has a weight, and so has each token: alike, or such that every reply counts alike (``balance`` in the config).
Distributions may be softened by a temperature T, ``p = softmax(logits / T)``; the KL is then multiplied by T^2, which
keeps the size of its gradient (Hinton et al., 2015). A cross entropy with the trace's own tokens may be added, which
paper B found to hurt. Divergences are in nats.

Where a forward pass has more than ``hidden_tokens`` response tokens, hidden states are compared at so many of them,
drawn at random without replacement, and the term is scaled up: its expected value and gradient are those over all. To
compare layer by layer instead would need the parent's state again when the child's layer learns: kept, that is 27 GB
for a row of 131,072 tokens of gpt-oss-120b; recomputed, a second pass through the parent. 8,192 tokens take 1.7 GB.

Memory: logits of at most ``logits_chunk_tokens`` tokens exist at once. A chunk's are computed again when its gradient
is, so that nothing of size ``token * vocab`` outlives a chunk; the same is done for the float32 copies of each layer.
Everything is computed and summed in float32 whatever the models compute in. A bfloat16 number is exact in TF32, so a
GPU that may use TF32 for matrix products loses nothing of the logits by it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.recover.distill.stage import DistillConfig


@dataclass(frozen=True)
class States:
    """What one model computed for the response tokens."""

    layers: Sequence[Float[Tensor, "compared hidden"]]
    """Output of every decoder layer, at the compared tokens."""
    final: Float[Tensor, "token hidden"]
    """After the final norm."""
    head: Float[Tensor, "vocab hidden"]
    """The output head's weight."""


@dataclass(frozen=True)
class LossParts:
    """Sums over response tokens, float32 scalars, differentiable in the child."""

    kl: Float[Tensor, ""]
    """T^2 KL(parent || child)."""
    hidden: Float[Tensor, ""]
    """1 - cosine, the mean over layers."""
    lm: Float[Tensor, ""]
    """Cross entropy with the trace's tokens; 0 without computing it if its weight is 0."""
    top1: Float[Tensor, ""]
    """Tokens whose likeliest next token is the parent's; has no gradient."""
    num_tokens: int
    """Response tokens."""

    def total(self, config: DistillConfig) -> Float[Tensor, ""]:
        """The weighted sum of the terms. Still a sum over tokens: divide it by the number of tokens of the step."""
        return config.kl_weight * self.kl + config.hidden_weight * self.hidden + config.lm_weight * self.lm


def distillation_loss(
    child: States,
    parent: States,
    labels: Int[Tensor, " token"],
    config: DistillConfig,
    weights: Float[Tensor, " token"] | None = None,
    compared: Int[Tensor, " compared"] | None = None,
) -> LossParts:
    """The loss of the child's states against the parent's at the same tokens; the parent gets no gradient.

    Args:
        child: may have other blocks than the parent, but as many layers.
        parent: see ``child``.
        labels: the token that follows each response token in the trace.
        config: weights, temperature and chunk size.
        weights: how much each token counts in the sums; all 1 unless given.
        compared: the response tokens whose layers are given, by number; all of them unless given.
    """
    weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
    shares = weights if compared is None else weights[compared] * (len(labels) / max(1, len(compared)))
    hidden = [
        recomputed(_cosine_distance, mine, theirs.detach(), shares)
        for mine, theirs in zip(child.layers, parent.layers, strict=True)
    ]
    child_head, parent_head = child.head.float(), parent.head.detach().float()  # once: chunks' gradients add in float32
    size = config.logits_chunk_tokens
    parts = (child.final, parent.final.detach(), labels, weights)
    sums = [
        recomputed(_compare_predictions, mine, child_head, theirs, parent_head, following, config, weight)
        for mine, theirs, following, weight in zip(*(part.split(size) for part in parts), strict=True)
    ]
    kl, lm, top1 = torch.stack(sums).sum(0).unbind()
    return LossParts(kl, torch.stack(hidden).mean(), lm, top1.detach(), len(labels))


def draw_compared(num_tokens: int, config: DistillConfig, *draw: int) -> Int[Tensor, " compared"]:
    """The response tokens to compare hidden states at, in their order; the same for the same seed and ``draw``."""
    tokens: Sequence[int] = range(num_tokens)
    if num_tokens > config.hidden_tokens:
        tokens = sorted(random.Random(f"{config.seed}/{draw}").sample(tokens, config.hidden_tokens))
    return torch.tensor(tokens, dtype=torch.long)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The function's value; for the gradient only its arguments are kept and the function is called again."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def _cosine_distance(
    child: Float[Tensor, "token hidden"], parent: Float[Tensor, "token hidden"], weights: Float[Tensor, " token"]
) -> Float[Tensor, ""]:
    """Weighted sum of 1 - cos(h, h') = |h/|h| - h'/|h'||^2 / 2, which does not cancel where both are close."""
    difference = F.normalize(child.float(), dim=-1) - F.normalize(parent.float(), dim=-1)
    return (difference.square().sum(-1) * weights).sum() / 2


def _compare_predictions(
    child: Float[Tensor, "token hidden"],
    child_head: Float[Tensor, "vocab hidden"],
    parent: Float[Tensor, "token hidden"],
    parent_head: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " token"],
    config: DistillConfig,
    weights: Float[Tensor, " token"],
) -> Float[Tensor, " sum"]:
    """Weighted sums over one chunk: KL, cross entropy, tokens of equal choice."""
    logits, goal = child.float() @ child_head.T, parent.float() @ parent_head.T
    log_q, log_p = ((raw / config.temperature).log_softmax(-1) for raw in (logits, goal))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * config.temperature**2
    lm = F.cross_entropy(logits, labels, reduction="none") if config.lm_weight else torch.zeros_like(kl)
    agreeing = (logits.argmax(-1) == goal.argmax(-1)).to(kl.dtype)
    return torch.stack((kl, lm, agreeing)) @ weights

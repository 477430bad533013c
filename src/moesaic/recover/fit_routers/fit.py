"""The fit of one router to the experts that are left (no part of the paper, which trains instead).

A pruned child's router was trained with experts that are gone. Behind pruned layers it sees other states, and a token
whose expert is gone gets the next one, with that one's share of the weight. So of each expert ``e`` the logit becomes

    z'_e = a_e z_e + b_e

which is a scale of the router's row and of its bias, and a bias; in families without one, ``b = 0``. With ``w`` the
weights that ``z'`` gives to the experts of a token, ``o_e`` what these return, and ``m`` what their mixture must be for
the layer to end where the parent's does, ``a`` and ``b`` minimise

    sum_t ||sum_e w_e o_e - m||^2 / sum_t ||m||^2 + ridge (sum_e (a_e - 1)^2 + b_e^2)

over calibration tokens ``t``. Only products of outputs with each other and with ``m`` take part, so outputs themselves
need not be kept.

Which experts are chosen has no gradient. So at first all are, each with its weight times ``sigmoid((c_e - h) / T)``,
where ``c`` is what experts are chosen by and ``h`` lies half-way between the last that is chosen and the next; ``T``
falls from a tenth to a hundredth of the spread of ``c``. What counts in the end is the error with experts chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moesaic.models import layers
from moesaic.models.layers import DecoderLayer, RouterScores

_OUTPUTS = 2**25
"""Elements of experts' outputs that are in memory at once."""
_ITERATIONS = 40
_SOFTNESS = (0.1, 0.03, 0.01)
"""``T`` over the standard deviation of ``c``, one fit after the other."""


@dataclass(frozen=True)
class Mixtures:
    """For some tokens what a layer's experts return and what their mixture must be, as products in float64."""

    outputs: Float[Tensor, "token expert expert"]
    """Of every expert's output with every other's."""
    wanted: Float[Tensor, "token expert"]
    """Of every expert's output with the wanted mixture."""
    energy: Float[Tensor, ""]
    """The sum of squares of the wanted mixtures."""

    def error(self, weights: Float[Tensor, "token expert"]) -> Float[Tensor, ""]:
        """The squared error of mixtures with these weights, as a share of ``energy``."""
        mixed = torch.einsum("te,tef,tf->", weights, self.outputs, weights)
        return (mixed - 2 * (weights * self.wanted).sum() + self.energy) / self.energy


@dataclass(frozen=True)
class Correction:
    """What a router's logits are multiplied with, and what is added then."""

    scale: Float[Tensor, " expert"]
    bias: Float[Tensor, " expert"]


@dataclass(frozen=True)
class Seen:
    """Some tokens as a layer sees them."""

    normed: Float[Tensor, "token hidden"]
    """What its router and its experts get."""
    mixtures: Mixtures

    def error(self, block: DecoderLayer) -> float:
        """The error of the layer's mixtures as its router is now."""
        scores = layers.scores_of_logits(block, layers.router_logits(block, self.normed).double())
        return float(self.mixtures.error(dense_weights(scores, layers.router_of(block).top_k)))


def see(block: DecoderLayer, attended: Float[Tensor, "token hidden"], ended: Float[Tensor, "token hidden"]) -> Seen:
    """Run all experts of a layer on some tokens.

    Args:
        block: the child's layer, which has experts.
        attended: the tokens behind its attention.
        ended: the same tokens behind the parent's layer.
    """
    normed = block.post_attention_layernorm(attended)
    wanted = ended - attended - layers.with_shared(block, normed, torch.zeros_like(normed))
    num_experts = len(block.mlp.experts.down_proj)
    outputs = normed.new_empty(len(normed), num_experts, num_experts, dtype=torch.float64)
    products = normed.new_empty(len(normed), num_experts, dtype=torch.float64)
    every, step = torch.arange(num_experts, device=normed.device), max(1, _OUTPUTS // (num_experts * normed.shape[1]))
    for start in range(0, len(normed), step):
        some = slice(start, start + step)
        states = normed[some]
        returned = layers.expert_outputs(block.mlp.experts, states, every.expand(len(states), -1)).double()
        torch.matmul(returned, returned.transpose(1, 2), out=outputs[some])
        products[some] = (returned @ wanted[some].double().unsqueeze(2)).squeeze(2)
    return Seen(normed, Mixtures(outputs, products, wanted.double().square().sum()))


def dense_weights(scores: RouterScores, top_k: int) -> Float[Tensor, "token expert"]:
    """What every expert of a token is weighted with, 0 if it is not chosen."""
    chosen = scores.choose(top_k)
    return torch.zeros_like(scores.log_weights).scatter(1, chosen, scores.weights(chosen, scores.log_weights.dtype))


def soft_weights(scores: RouterScores, top_k: int, softness: float) -> Float[Tensor, "token expert"]:
    """The same, nearly: an expert that is nearly chosen has a weight as well, which has a gradient."""
    best = scores.choice.topk(min(top_k + 1, scores.choice.shape[1]), dim=-1).values
    if best.shape[1] == top_k:
        return dense_weights(scores, top_k)
    half_way = best[:, -2:].mean(-1, keepdim=True)
    gates = F.logsigmoid((scores.choice - half_way) / softness)
    return scores.scale * torch.softmax(scores.log_weights + gates, dim=-1)


def fit(block: DecoderLayer, seen: Seen, ridge: float) -> Correction:
    """The correction of least error, by L-BFGS from none.

    Args:
        block: a layer, whose router stays as it is.
        seen: the tokens to fit on.
        ridge: see above.
    """
    router, logits = layers.router_of(block), layers.router_logits(block, seen.normed).double()
    scale, bias = torch.ones_like(logits[0]), torch.zeros_like(logits[0])
    learned = [scale, bias] if getattr(router, "bias", None) is not None else [scale]
    spread = float(layers.scores_of_logits(block, logits).choice.std())

    def loss(softness: float | None) -> Tensor:
        scores = layers.scores_of_logits(block, scale * logits + bias)
        weights = soft_weights(scores, router.top_k, softness) if softness else dense_weights(scores, router.top_k)
        return seen.mixtures.error(weights) + ridge * ((scale - 1).square().sum() + bias.square().sum())

    def corrected() -> tuple[float, Correction]:
        return float(loss(None)), Correction(scale.detach().clone(), bias.detach().clone())

    with torch.no_grad():
        tried = [corrected()]
    for softness in _SOFTNESS:
        _minimise(partial(loss, softness * spread), learned)
        with torch.no_grad():
            tried.append(corrected())
    return min(tried, key=lambda each: each[0])[1]


@torch.enable_grad()
def _minimise(loss: Callable[[], Tensor], learned: Sequence[Tensor]) -> None:
    """Move tensors to where a loss is least."""
    for tensor in learned:
        tensor.requires_grad_()
    optimizer = torch.optim.LBFGS(learned, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(evaluate)

"""The mathematics of one layer: transformers' own decoder layer of a family, run half by half.

A block is split where the method needs it: :func:`attend` (norm, attention, residual) takes the window per call, and
:func:`mix` (norm, router, experts, residual) takes the experts that are left, how many of them a token uses, and which
of their channels are left. An expert is left out by minus infinity as what it is chosen by, which equals slicing its
rows away, so fewer experts need no weights of their own (paper A, pruning). Channels are sliced out for the call.
Sequences are padded on the right: causal attention keeps padding out of sight, and what padding computes is never read.

With ``z`` the router's logits, a token's experts ``S`` are those with the largest ``c``, and their weights ``w``::

    softmax    c = z                 w = softmax(z[S])
    sigmoid    c = sigmoid(z) + b    w = r * sigmoid(z[S]) / sum sigmoid(z[S]) = r * softmax(log sigmoid(z)[S])

The first is also what families compute which take the softmax over all logits and divide by the sum over ``S``. In the
second the correction ``b`` takes part in choosing alone. So one softmax serves all, over what is called *log weights*
here. Shared experts are added unweighted. How expert weights lie in memory, transformers' module says.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.core.errors import StageError
from moesaic.models import layout
from moesaic.models.families import FAMILIES
from moesaic.models.families.family import Family

DecoderLayer: TypeAlias = Any
"""Transformers' own decoder layer, of any family."""
Experts: TypeAlias = Any
"""The experts of such a layer: ``gate_up_proj`` and ``down_proj``, whose first axis counts experts."""
Rotary = tuple[Float[Tensor, "1 position half"], Float[Tensor, "1 position half"]]
"""Cosine and sine of every position, at least as many as any batch has."""


_OnGated = Callable[[int, Int[Tensor, " pair"], Float[Tensor, "pair channel"]], None]
"""Is shown an expert's id, its (token, slot) pairs, and what goes into its second projection."""


@dataclass(frozen=True)
class Head:
    """What follows the last layer."""

    norm: nn.Module
    weight: Float[Tensor, "vocab hidden"]

    def normed(self, hidden: Float[Tensor, "*token hidden"]) -> Float[Tensor, "*token hidden"]:
        """The final-norm hidden states in float32."""
        normed: Tensor = self.norm(hidden.to(self.weight.device, torch.float32))
        return normed

    def logits(self, normed: Float[Tensor, "*token hidden"]) -> Float[Tensor, "*token vocab"]:
        """Next-token logits in float32, out of what :meth:`normed` returned."""
        return F.linear(normed.to(self.weight), self.weight).float()


@dataclass(frozen=True)
class RouterScores:
    """What a layer's experts are chosen and weighted by."""

    choice: Float[Tensor, "token expert"]
    """Those with the largest values are chosen."""
    log_weights: Float[Tensor, "token expert"]
    """Up to one constant of each token."""
    scale: float
    """What a token's weights add up to."""

    def choose(self, num_slots: int) -> Int[Tensor, "token slot"]:
        """So many experts of each token, best first."""
        return self.choice.topk(num_slots, dim=-1).indices

    def without(self, experts: Sequence[int]) -> "RouterScores":
        """The same, with minus infinity for the choice of some experts."""
        removed = torch.tensor(list(experts), dtype=torch.long, device=self.choice.device)
        return replace(self, choice=self.choice.index_fill(1, removed, float("-inf")))

    def weights(self, expert_ids: Int[Tensor, "token slot"], dtype: torch.dtype) -> Float[Tensor, "token slot"]:
        """What each of a token's experts is weighted with; computed in this dtype, or the scores' if that is wider."""
        chosen = self.log_weights.gather(1, expert_ids)
        return (self.scale * torch.softmax(chosen.to(torch.promote_types(chosen.dtype, dtype)), dim=-1)).to(dtype)


@dataclass(frozen=True)
class Routing:
    """How a layer's experts were chosen and what they returned."""

    scores: RouterScores
    expert_ids: Int[Tensor, "token slot"]
    """The experts that come first, best first; possibly more slots than the layer mixes."""
    outputs: Float[Tensor, "token slot hidden"]
    """What each of them returned, not yet weighted."""
    top_k: int
    """How many slots the layer mixes."""
    energies: Float[Tensor, "expert channel"]
    """Of what goes into an expert's second projection, times the expert's weight: the sum of squares over tokens."""

    def weights(self) -> Float[Tensor, "token slot"]:
        """What the layer mixes the ``top_k`` chosen experts with."""
        return self.scores.weights(self.expert_ids[:, : self.top_k], self.outputs.dtype)

    def mixture(self) -> Float[Tensor, "token hidden"]:
        """The output of the layer's mixture of experts; what all tokens share is not part of it."""
        return torch.einsum("ts,tsh->th", self.weights(), self.outputs[:, : self.top_k])


def check_finite(layer: int, what: str, states: Tensor) -> Tensor:
    """The states, all of which are finite.

    Raises:
        StageError: otherwise; it names the layer.
    """
    low, high = states.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise StageError(
            f"layer {layer}: {what} are not finite, so nothing can be sorted or summed by them; "
            "use precision float32, or another checkpoint"
        )
    return states


def attend(
    block: DecoderLayer, hidden: Float[Tensor, "batch time hidden"], rotary: Rotary, window: int | None
) -> Float[Tensor, "batch time hidden"]:
    """The attention half of a block, with any window."""
    block.self_attn.sliding_window = window
    time = hidden.shape[1]
    rotary = (rotary[0][:, :time], rotary[1][:, :time])
    output: Tensor = block.self_attn(block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
    return hidden + output


def mix(
    block: DecoderLayer,
    attended: Float[Tensor, "*token hidden"],
    kept: Sequence[int] | None = None,
    top_k: int | None = None,
    channels: Int[Tensor, "expert kept_channel"] | None = None,
) -> Float[Tensor, "*token hidden"]:
    """The mixture-of-experts half of a block; of one without experts its feed-forward network.

    Args:
        block: the layer.
        attended: what :func:`attend` returned.
        kept: the experts that are left; None for all.
        top_k: how many of them a token uses, weighted among these alone; None for as many as in the block.
        channels: of every expert of the block those that are left; None for all.
    """
    states = block.post_attention_layernorm(attended).flatten(0, -2)
    if is_dense(block):
        dense: Tensor = block.mlp(states)
        return attended + dense.view_as(attended)
    scores = router_scores(block, states)
    if kept is not None:
        scores = scores.without(sorted(set(range(scores.choice.shape[1])) - set(kept)))
    expert_ids = scores.choose(top_k or router_of(block).top_k)
    run = mixture if states.device.type == "cpu" else grouped_mixture
    experts = block.mlp.experts if channels is None else narrow(block.mlp.experts, channels)
    mixed = run(experts, states, expert_ids, scores.weights(expert_ids, states.dtype))
    return attended + with_shared(block, states, mixed).view_as(attended)


def mix_sliced(
    block: DecoderLayer,
    attended: Float[Tensor, "*token hidden"],
    kept: Sequence[int],
    top_k: int | None = None,
) -> Float[Tensor, "*token hidden"]:
    """What :func:`mix` computes by masking, computed by slicing the router to the rows ``kept``; copies no weights."""
    states = block.post_attention_layernorm(attended).flatten(0, -2)
    rows = torch.tensor(list(kept), device=states.device)
    scores = router_scores(block, states, rows)
    slots = scores.choose(top_k or router_of(block).top_k)
    outputs = expert_outputs(block.mlp.experts, states, rows[slots])
    mixed = torch.einsum("ts,tsh->th", scores.weights(slots, states.dtype), outputs)
    return attended + with_shared(block, states, mixed).view_as(attended)


def is_dense(block: DecoderLayer) -> bool:
    """Whether the layer has no experts."""
    return not hasattr(block.mlp, "experts")


def with_shared(
    block: DecoderLayer, states: Float[Tensor, "token hidden"], mixed: Float[Tensor, "token hidden"]
) -> Float[Tensor, "token hidden"]:
    """The mixture of a layer's experts, and what its shared experts add, if it has such."""
    shared = getattr(block.mlp, "shared_experts", None)
    return mixed if shared is None else mixed + shared(states)


def router_of(block: DecoderLayer) -> Any:
    """The layer's router: ``weight`` [expert hidden], ``top_k``, and in some families a bias, a correction, a scale."""
    return block.get_submodule(_family_of(block).router)


def _family_of(block: DecoderLayer) -> Family:
    return FAMILIES[block.self_attn.config.model_type]


def device_of(block: DecoderLayer) -> torch.device:
    """Where the layer computes."""
    device: torch.device = block.input_layernorm.weight.device
    return device


def router_scores(
    block: DecoderLayer, states: Float[Tensor, "token hidden"], rows: Int[Tensor, " expert"] | None = None
) -> RouterScores:
    """What the layer's experts, or those of some rows of its router, are chosen and weighted by."""
    return scores_of_logits(block, router_logits(block, states, rows), rows)


def router_logits(
    block: DecoderLayer, states: Float[Tensor, "token hidden"], rows: Int[Tensor, " expert"] | None = None
) -> Float[Tensor, "token expert"]:
    """``z`` of the layer's experts, or of those of some rows of its router."""
    router = router_of(block)
    taken: Any = slice(None) if rows is None else rows
    if _family_of(block).scores == "sigmoid":
        return F.linear(states.float(), router.weight[taken].float())
    bias = getattr(router, "bias", None)
    return F.linear(states, router.weight[taken], None if bias is None else bias[taken])


def scores_of_logits(
    block: DecoderLayer, logits: Float[Tensor, "token expert"], rows: Int[Tensor, " expert"] | None = None
) -> RouterScores:
    """What experts with these ``z`` are chosen and weighted by."""
    if _family_of(block).scores == "softmax":
        return RouterScores(logits, logits, 1.0)
    router = router_of(block)
    choice = logits.sigmoid() + router.e_score_correction_bias[slice(None) if rows is None else rows]
    return RouterScores(choice, F.logsigmoid(logits), router.routed_scaling_factor)


def run_block(
    block: DecoderLayer,
    hidden: Float[Tensor, "batch time hidden"],
    rotary: Rotary,
    window: int | None,
    kept: Sequence[int] | None = None,
    top_k: int | None = None,
    channels: Int[Tensor, "expert kept_channel"] | None = None,
) -> Float[Tensor, "batch time hidden"]:
    """A whole block with the given window, experts, experts per token and channels."""
    return mix(block, attend(block, hidden, rotary, window), kept, top_k, channels)


def slice_block(
    block: DecoderLayer, kept: Sequence[int], channels: Int[Tensor, "kept_expert kept_channel"] | None = None
) -> DecoderLayer:
    """The physically pruned block: router rows and experts ``kept``, in that order; everything else is shared.

    Each of these experts has the given channels only, or all.
    """
    config = copy.copy(block.self_attn.config)
    setattr(config, _family_of(block).config_key("num_experts"), len(kept))
    with torch.device("meta"):
        sliced = type(block)(config, layer_idx=0)
    rows = torch.tensor(list(kept), device=device_of(block))
    state = {
        name: _select(tensor, rows) if layout.is_expert_indexed(f".{name}") else tensor
        for name, tensor in block.state_dict().items()
    }
    sliced.load_state_dict(state, assign=True)
    if channels is not None:
        sliced.mlp.experts = narrow(sliced.mlp.experts, channels)
    return sliced.eval().requires_grad_(False)


def narrow(experts: Experts, channels: Int[Tensor, "expert kept_channel"]) -> Experts:
    """The experts with these channels only, in that order; weights keep their memory layout."""
    config = copy.copy(experts.config)
    setattr(config, FAMILIES[config.model_type].config_key("expert_width"), channels.shape[1])
    with torch.device("meta"):
        narrowed = type(experts)(config)
    channels = channels.to(experts.down_proj.device)
    each = torch.arange(len(channels), device=channels.device).unsqueeze(1)
    gate_up, down = _outputs_first(experts, experts.gate_up_proj), _outputs_first(experts, experts.down_proj)
    rows = _gate_up_rows(experts, channels)
    columns = channels.unsqueeze(1).expand(-1, down.shape[1], -1)
    state = {
        "gate_up_proj": _outputs_first(experts, gate_up[each, rows]),
        "down_proj": _outputs_first(experts, down.gather(2, columns)),
    }
    if experts.has_bias:
        biases = {"gate_up_proj_bias": experts.gate_up_proj_bias[each, rows], "down_proj_bias": experts.down_proj_bias}
        state |= biases
    narrowed.load_state_dict(state, assign=True)
    return narrowed.eval().requires_grad_(False)


def _outputs_first(experts: Experts, weights: Float[Tensor, "expert *axes"]) -> Float[Tensor, "expert *axes"]:
    """Weights whose rows are outputs, of such as the experts hold; and the other way round."""
    return weights.transpose(1, 2) if experts.is_transposed else weights


def _gate_up_rows(experts: Experts, channels: Int[Tensor, "expert channel"]) -> Int[Tensor, "expert row"]:
    """Where of these channels gate and up are among the outputs of the first projection."""
    if experts.is_concatenated:
        return torch.cat([channels, channels + expert_width(experts)], dim=1)
    return torch.stack([2 * channels, 2 * channels + 1], dim=-1).flatten(1)  # the two are neighbours


def expert_width(experts: Experts) -> int:
    """Channels of each expert."""
    return int(_outputs_first(experts, experts.down_proj).shape[2])


def down_norms(experts: Experts) -> Float[Tensor, "expert channel"]:
    """Of every channel the squared norm of what it adds to the output, in float64 on the host."""
    return torch.stack([rows.double().square().sum(0) for rows in _outputs_first(experts, experts.down_proj)]).cpu()


def _select(tensor: Tensor, rows: Tensor) -> Tensor:
    """Select experts; keeps the memory layout that :func:`~moesaic.models.loading.build_block` gives to weights."""
    if tensor.is_contiguous():
        return tensor.index_select(0, rows)
    return tensor.transpose(-1, -2).index_select(0, rows).transpose(-1, -2)


def route(block: DecoderLayer, states: Float[Tensor, "token hidden"], num_spare: int = 0) -> Routing:
    """Route normed hidden states and keep every chosen expert's output.

    Args:
        block: the layer.
        states: what ``post_attention_layernorm`` returned.
        num_spare: how many of the next-best experts to run as well.
    """
    scores, top_k = router_scores(block, states), router_of(block).top_k
    slots = min(top_k + num_spare, scores.choice.shape[1])
    expert_ids = scores.choose(slots)
    weights = F.pad(scores.weights(expert_ids[:, :top_k], states.dtype), (0, slots - top_k)).flatten()
    experts = block.mlp.experts
    size = len(experts.down_proj), expert_width(experts)
    energies = torch.zeros(size, dtype=torch.float64, device=states.device)

    def add_up(expert: int, pairs: Tensor, gated: Tensor) -> None:
        energies[expert] = (weights[pairs].unsqueeze(1) * gated).float().square().sum(0, dtype=torch.float64)

    return Routing(scores, expert_ids, expert_outputs(experts, states, expert_ids, add_up), top_k, energies)


def expert_outputs(
    experts: Experts,
    states: Float[Tensor, "token hidden"],
    expert_ids: Int[Tensor, "token slot"],
    on_gated: _OnGated | None = None,
) -> Float[Tensor, "token slot hidden"]:
    """The unweighted output of every chosen expert, one matrix product per expert."""
    order, sorted_outputs = _run_experts(experts, states, expert_ids, on_gated)
    outputs = torch.empty_like(sorted_outputs).index_copy_(0, order, sorted_outputs)
    return outputs.view(*expert_ids.shape, -1)


def mixture(
    experts: Experts,
    states: Float[Tensor, "token hidden"],
    expert_ids: Int[Tensor, "token slot"],
    weights: Float[Tensor, "token slot"],
) -> Float[Tensor, "token hidden"]:
    """The weighted sum of the chosen experts' outputs."""
    order, outputs = _run_experts(experts, states, expert_ids)
    weighted = outputs * weights.flatten().index_select(0, order).unsqueeze(1)
    return torch.zeros_like(states).index_add(0, order // expert_ids.shape[1], weighted)


def grouped_mixture(
    experts: Experts,
    states: Float[Tensor, "token hidden"],
    expert_ids: Int[Tensor, "token slot"],
    weights: Float[Tensor, "token slot"],
) -> Float[Tensor, "token hidden"]:
    """The same by transformers' own function, all experts at once and ``EXPERT_TOKENS`` tokens at a time."""
    parts = (each.split(layout.EXPERT_TOKENS) for each in (states, expert_ids, weights))
    return torch.cat([experts(*part) for part in zip(*parts, strict=True)])


def _run_experts(
    experts: Experts, states: Tensor, expert_ids: Tensor, on_gated: _OnGated | None = None
) -> tuple[Tensor, Tensor]:
    """Every (token, slot) pair, sorted by expert, and what its expert returns."""
    order = expert_ids.flatten().argsort(stable=True)
    counts = expert_ids.flatten().bincount(minlength=len(experts.down_proj)).tolist()
    inputs = states.index_select(0, order // expert_ids.shape[1]).split(counts)
    outputs = []
    for expert, (own, pairs) in enumerate(zip(inputs, order.split(counts), strict=True)):
        if len(own):
            gated = experts._apply_gate(_project(experts, "gate_up_proj", expert, own))
            if on_gated is not None:
                on_gated(expert, pairs, gated)
            outputs.append(_project(experts, "down_proj", expert, gated))
    return order, torch.cat(outputs)


def _project(experts: Experts, name: str, expert: int, states: Float[Tensor, "pair column"]) -> Tensor:
    """One of an expert's projections."""
    weight = getattr(experts, name)[expert]
    columns = weight if experts.is_transposed else weight.T
    return (
        torch.addmm(getattr(experts, f"{name}_bias")[expert], states, columns) if experts.has_bias else states @ columns
    )

"""The mathematics of one layer: transformers' own decoder layer of a family, run half by half.

A block is split where the method needs it: :func:`attend` (norm, attention, residual) takes the window per call, and
:func:`mix` (norm, router, experts, residual) takes the experts that are left, how many of them a token uses, and which
of their channels are left. An expert is left out by minus infinity as its router logit, which equals slicing its rows
away, so fewer experts need no weights of their own (paper A, pruning). Channels are sliced out for the call.
Sequences are padded on the right: causal attention keeps padding out of sight, and what padding computes is never read.

A token's weights are a softmax over the logits of its experts. That is what families compute which take it over all
logits and divide by the sum over the experts chosen. How expert weights lie in memory, transformers' module says.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.core.errors import StageError
from moesaic.models import layout
from moesaic.models.families import FAMILIES

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
class Routing:
    """How a layer's experts were chosen and what they returned."""

    logits: Float[Tensor, "token expert"]
    expert_ids: Int[Tensor, "token slot"]
    """The experts with the largest logits, best first; possibly more slots than the layer mixes."""
    outputs: Float[Tensor, "token slot hidden"]
    """What each of them returned, not yet weighted."""
    top_k: int
    """How many slots the layer mixes."""
    energies: Float[Tensor, "expert channel"]
    """Of what goes into an expert's second projection, times the expert's weight: the sum of squares over tokens."""

    def chosen_logits(self) -> Float[Tensor, "token slot"]:
        """The logits of ``expert_ids``."""
        return self.logits.gather(1, self.expert_ids)

    def weights(self) -> Float[Tensor, "token slot"]:
        """Softmax over the ``top_k`` chosen experts: what the layer mixes with."""
        return torch.softmax(self.chosen_logits()[:, : self.top_k], dim=-1)

    def mixture(self) -> Float[Tensor, "token hidden"]:
        """The output of the layer's mixture of experts."""
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
    """The mixture-of-experts half of a block.

    Args:
        block: the layer.
        attended: what :func:`attend` returned.
        kept: the experts that are left; None for all.
        top_k: how many of them a token uses, weighted by a softmax over these alone; None for as many as in the block.
        channels: of every expert of the block those that are left; None for all.
    """
    states = block.post_attention_layernorm(attended).flatten(0, -2)
    values, expert_ids = router_logits(block, states, kept).topk(top_k or router_of(block).top_k, dim=-1)
    run = mixture if states.device.type == "cpu" else grouped_mixture
    experts = block.mlp.experts if channels is None else narrow(block.mlp.experts, channels)
    return attended + run(experts, states, expert_ids, torch.softmax(values, dim=-1)).view_as(attended)


def mix_sliced(
    block: DecoderLayer,
    attended: Float[Tensor, "*token hidden"],
    kept: Sequence[int],
    top_k: int | None = None,
) -> Float[Tensor, "*token hidden"]:
    """What :func:`mix` computes by masking, computed by slicing the router to the rows ``kept``; copies no weights."""
    router, states = router_of(block), block.post_attention_layernorm(attended).flatten(0, -2)
    rows = torch.tensor(list(kept), device=states.device)
    bias = getattr(router, "bias", None)
    logits = F.linear(states, router.weight[rows], None if bias is None else bias[rows])
    values, slots = logits.topk(top_k or router.top_k, dim=-1)
    outputs = expert_outputs(block.mlp.experts, states, rows[slots])
    return attended + torch.einsum("ts,tsh->th", torch.softmax(values, dim=-1), outputs).view_as(attended)


def router_of(block: DecoderLayer) -> Any:
    """The layer's router: ``weight`` [expert hidden], a ``bias`` in some families, ``top_k``."""
    return block.get_submodule(FAMILIES[block.self_attn.config.model_type].router)


def device_of(block: DecoderLayer) -> torch.device:
    """Where the layer computes."""
    device: torch.device = block.input_layernorm.weight.device
    return device


def router_logits(
    block: DecoderLayer, states: Float[Tensor, "token hidden"], kept: Sequence[int] | None = None
) -> Float[Tensor, "token expert"]:
    """The router's logits, minus infinity for experts that are not kept."""
    router = router_of(block)
    logits = F.linear(states, router.weight, getattr(router, "bias", None))
    if kept is None:
        return logits
    removed = sorted(set(range(len(router.weight))) - set(kept))
    return logits.index_fill(1, torch.tensor(removed, dtype=torch.long, device=logits.device), float("-inf"))


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
    setattr(config, FAMILIES[config.model_type].config_key("num_experts"), len(kept))
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
    logits = router_logits(block, states)
    top_k = router_of(block).top_k
    slots = min(top_k + num_spare, logits.shape[1])
    leaders, expert_ids = logits.topk(slots, dim=-1)
    weights = F.pad(torch.softmax(leaders[:, :top_k], dim=-1), (0, slots - top_k)).flatten()
    experts = block.mlp.experts
    size = len(experts.down_proj), expert_width(experts)
    energies = torch.zeros(size, dtype=torch.float64, device=states.device)

    def add_up(expert: int, pairs: Tensor, gated: Tensor) -> None:
        energies[expert] = (weights[pairs].unsqueeze(1) * gated).float().square().sum(0, dtype=torch.float64)

    return Routing(logits, expert_ids, expert_outputs(experts, states, expert_ids, add_up), top_k, energies)


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

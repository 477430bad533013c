"""One block at a time: transformers' own gpt-oss layer, built from a checkpoint, run over batches, and dropped.

A block is split where the method needs it: :func:`attend` (norm, attention, residual) takes the window per call, and
:func:`mix` (norm, router, experts, residual) takes the experts that are left. Leaving out an expert is minus infinity
as its router logit, which equals slicing its rows away, so a variant needs no weights of its own (paper A, pruning).
Sequences are padded on the right: causal attention keeps padding out of sight, and what padding computes is never read.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssExperts,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
)

from moesaic import attention, gpt_oss
from moesaic.architecture import Block
from moesaic.checkpoint import Checkpoint

Rotary = tuple[Float[Tensor, "1 position half"], Float[Tensor, "1 position half"]]
"""Cosine and sine of every position, at least as many as any batch has."""

_NOT_OF_A_LAYER = ("quantization_config", "auto_map", "block_configs", "architectures", "dtype", "torch_dtype")


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

    def chosen_logits(self) -> Float[Tensor, "token slot"]:
        """The logits of ``expert_ids``."""
        return self.logits.gather(1, self.expert_ids)

    def weights(self) -> Float[Tensor, "token slot"]:
        """Softmax over the ``top_k`` chosen experts: what the layer mixes with."""
        return torch.softmax(self.chosen_logits()[:, : self.top_k], dim=-1)

    def mixture(self) -> Float[Tensor, "token hidden"]:
        """The output of the layer's mixture of experts."""
        return torch.einsum("ts,tsh->th", self.weights(), self.outputs[:, : self.top_k])


def choose_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer_config(checkpoint: Checkpoint, block: Block) -> GptOssConfig:
    """A transformers config of one layer of this shape."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_OF_A_LAYER}
    config.update(
        model_type=gpt_oss.PARENT_TYPE,
        num_hidden_layers=1,
        num_local_experts=block.num_experts,
        sliding_window=block.window,
        layer_types=["full_attention" if block.window is None else "sliding_attention"],
    )
    return GptOssConfig.from_dict(config)


def load_block(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> GptOssDecoderLayer:
    """Build one layer and read its weights; norms stay in float32, as transformers keeps them."""
    attention.register()
    config = layer_config(checkpoint, checkpoint.architecture.blocks[layer])
    config._attn_implementation = attention.NAME
    config._experts_implementation = "eager" if torch.device(device).type == "cpu" else "grouped_mm"
    with torch.device("meta"):
        block = GptOssDecoderLayer(config, layer_idx=0)
    block.load_state_dict(checkpoint.layer_state(layer, dtype), assign=True)
    block.input_layernorm.float()
    block.post_attention_layernorm.float()
    return block.to(device).eval().requires_grad_(False)


def embed(checkpoint: Checkpoint, token_ids: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The states [batch time hidden] in which token ids [batch time] enter the first layer; the table is read once."""
    table = checkpoint.tensor(gpt_oss.EMBEDDING)
    return [table[batch].to(dtype) for batch in token_ids]


def load_head(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Head:
    """The final norm, in float32, and the output head."""
    epsilon = layer_config(checkpoint, checkpoint.architecture.blocks[0]).rms_norm_eps
    norm = GptOssRMSNorm(checkpoint.shape.hidden_size, eps=epsilon)
    norm.load_state_dict({"weight": checkpoint.tensor(gpt_oss.FINAL_NORM).float()}, assign=True)
    return Head(norm.to(device).requires_grad_(False), checkpoint.tensor(gpt_oss.HEAD).to(device, dtype))


def rotary(
    checkpoint: Checkpoint, num_positions: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Rotary:
    """Cosine and sine for positions 0 to ``num_positions - 1``, which all layers share."""
    embedding = GptOssRotaryEmbedding(layer_config(checkpoint, checkpoint.architecture.blocks[0]))
    positions = torch.arange(num_positions).unsqueeze(0)
    cosine, sine = embedding(torch.empty(0, dtype=dtype), positions)
    return cosine.to(device), sine.to(device)


def attend(
    block: GptOssDecoderLayer, hidden: Float[Tensor, "batch time hidden"], turns: Rotary, window: int | None
) -> Float[Tensor, "batch time hidden"]:
    """The attention half of a block, with any window."""
    block.self_attn.sliding_window = window
    time = hidden.shape[1]
    turns = (turns[0][:, :time], turns[1][:, :time])
    output: Tensor = block.self_attn(block.input_layernorm(hidden), position_embeddings=turns, attention_mask=None)[0]
    return hidden + output


def mix(
    block: GptOssDecoderLayer, attended: Float[Tensor, "*token hidden"], kept: Sequence[int] | None = None
) -> Float[Tensor, "*token hidden"]:
    """The mixture-of-experts half of a block, with only the experts ``kept`` (None: all)."""
    states = block.post_attention_layernorm(attended).flatten(0, -2)
    values, expert_ids = router_logits(block, states, kept).topk(block.mlp.router.top_k, dim=-1)
    mixed: Tensor = block.mlp.experts(states, expert_ids, torch.softmax(values, dim=-1))
    return attended + mixed.view_as(attended)


def router_logits(
    block: GptOssDecoderLayer, states: Float[Tensor, "token hidden"], kept: Sequence[int] | None = None
) -> Float[Tensor, "token expert"]:
    """The router's logits, minus infinity for experts that are not kept."""
    router = block.mlp.router
    logits = F.linear(states, router.weight, router.bias)
    if kept is None:
        return logits
    removed = sorted(set(range(router.num_experts)) - set(kept))
    return logits.index_fill(1, torch.tensor(removed, dtype=torch.long, device=logits.device), float("-inf"))


def run_block(
    block: GptOssDecoderLayer,
    hidden: Float[Tensor, "batch time hidden"],
    turns: Rotary,
    window: int | None,
    kept: Sequence[int] | None = None,
) -> Float[Tensor, "batch time hidden"]:
    """A whole block with the given window and experts."""
    return mix(block, attend(block, hidden, turns, window), kept)


def slice_block(block: GptOssDecoderLayer, kept: Sequence[int]) -> GptOssDecoderLayer:
    """The physically pruned block: router rows and experts ``kept``, in that order; everything else is shared."""
    config = copy.copy(block.self_attn.config)
    config.num_local_experts = len(kept)
    with torch.device("meta"):
        sliced = GptOssDecoderLayer(config, layer_idx=0)
    rows = torch.tensor(list(kept), device=block.mlp.router.weight.device)
    state = {
        name: tensor.index_select(0, rows) if gpt_oss.is_expert_indexed(f".{name}") else tensor
        for name, tensor in block.state_dict().items()
    }
    sliced.load_state_dict(state, assign=True)
    return sliced.eval().requires_grad_(False)


def route(block: GptOssDecoderLayer, states: Float[Tensor, "token hidden"], num_spare: int = 0) -> Routing:
    """Route normed hidden states and keep every chosen expert's output.

    Args:
        block: the layer.
        states: what ``post_attention_layernorm`` returned.
        num_spare: how many of the next-best experts to run as well.
    """
    logits = router_logits(block, states)
    top_k = block.mlp.router.top_k
    slots = min(top_k + num_spare, logits.shape[1])
    expert_ids = logits.topk(slots, dim=-1).indices
    return Routing(logits, expert_ids, expert_outputs(block.mlp.experts, states, expert_ids), top_k)


def expert_outputs(
    experts: GptOssExperts, states: Float[Tensor, "token hidden"], expert_ids: Int[Tensor, "token slot"]
) -> Float[Tensor, "token slot hidden"]:
    """The unweighted output of every chosen expert, one matrix product per expert."""
    order = expert_ids.flatten().argsort(stable=True)
    counts = expert_ids.flatten().bincount(minlength=experts.num_experts).tolist()
    inputs = states[order // expert_ids.shape[1]]
    outputs = torch.empty_like(inputs)
    for expert, (rows, own) in enumerate(zip(torch.split(order, counts), torch.split(inputs, counts), strict=True)):
        gate_up = own @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        outputs[rows] = experts._apply_gate(gate_up) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    return outputs.view(*expert_ids.shape, -1)

"""A gpt-oss child as AutoModel's own model class, for training on GPU clusters with expert parallelism and FSDP2.

Everything but four things is AutoModel's gpt-oss: its blocks, mixture layers, norms, initialisation, head,
parallelizer and loader. The four:

- layer i is built from its own block of the config: ``E_i`` experts of its own width, its own window (None: full);
- attention knows documents packed into a row (``position_ids`` restart at 0) and runs on a CPU as well, where it is
  ``moesaic.models.attention``; elsewhere it is ``cluster_attention``;
- experts are ``cluster_experts``: in bfloat16, a chunk of tokens at a time;
- rotary frequencies are transformers' own, so that a config that AutoModel's formula does not cover is not misread.

The gate balances nothing: no bias update and no auxiliary loss, whatever the config says (gpt-oss configs say 0.9),
because a router that recovery does not train must not move, and one that it trains follows the parent.

A parent is a child whose blocks are all its own. ``register`` gives parents to this class too, since AutoModel's own
lets packed documents see each other, unless Transformer Engine computes attention, whose windows it makes one key wide
too many.

Rows may be padded on the right only, as in AutoModel's gpt-oss. Exercised on CPUs in float32: loading packed and
unpacked children, logits and gradients against transformers, and the same on gloo ranks through AutoModel's own set-up:
FSDP2, expert parallelism with activation checkpointing, and both at once. Written for GPUs but not run on one: the
compiled FlexAttention kernel (its mask and formula are checked uncompiled), NCCL, bfloat16 mixed precision, the fused
dispatchers. Tensor, context and pipeline parallelism it lacks, as AutoModel's gpt-oss does.

It takes from AutoModel only what both 0.7 and the commit that NeMo-RL pins (24b47e85) have.
"""

from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from nemo_automodel._transformers.registry import ModelRegistry
from nemo_automodel.components.models.common import (
    BackendConfig,
    initialize_linear_module,
    initialize_rms_norm_module,
)
from nemo_automodel.components.models.gpt_oss.layers import GptOssAttention
from nemo_automodel.components.models.gpt_oss.model import Block, GptOssForCausalLM, GptOssModel
from nemo_automodel.components.models.gpt_oss.rope_utils import (
    RotaryEmbedding,
    apply_rotary_emb_qk,
    position_ids_to_freqs_cis,
)
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.shared.utils import dtype_from_str
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import GptOssConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from moesaic.core.errors import ConfigError
from moesaic.models import whole_model
from moesaic.models.attention import document_starts, sink_attention
from moesaic.models.families.gpt_oss import GPT_OSS
from moesaic.models.families.gpt_oss_puzzle.configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from moesaic.models.resolved_config import as_class, read_config_file
from moesaic.recover.distill.automodel.cluster_attention import (
    first_keys,
    flex_sink_attention,
    runs_flex_attention,
    tile_mask,
)
from moesaic.recover.distill.automodel.cluster_experts import StreamedExperts
from moesaic.recover.distill.automodel.cluster_weights import PuzzleStateDictAdapter


class PuzzleRotaryEmbedding(RotaryEmbedding):
    """Rotary frequencies as transformers computes them from the config."""

    def __init__(self, config: GptOssPuzzleConfig, device: torch.device) -> None:
        super().__init__(config.head_dim, config.rope_parameters["rope_theta"], torch.float32, device=device)
        self.config = config

    @torch.no_grad()
    def _compute_concentration_and_inv_freq(self) -> tuple[float, Tensor]:
        rope = GptOssRotaryEmbedding(self.config, device=self.device)
        return rope.attention_scaling, rope.inv_freq


class PuzzleAttention(GptOssAttention):
    """AutoModel's gpt-oss attention layer with one window of its own, and with documents."""

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_mask: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        tile_masks: dict[int | None, BlockMask] | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states in and out, [batch, token, hidden].

        Args:
            x: after the layer's norm.
            freqs_cis: cosines and sines of every token's position.
            attention_mask: not needed, since padding is on the right, where no token sees it.
            documents: where each token's document begins, used without ``tile_masks``; None for one document a row.
            tile_masks: FlexAttention's mask of every distinct window, where that computes attention.
        """
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_emb_qk(query, key, freqs_cis, rope_fusion=False)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        sinks = self.sinks.to_local() if isinstance(self.sinks, DTensor) else self.sinks
        if tile_masks is None:
            output = sink_attention(
                query, key, value, sinks, self.softmax_scale, self.sliding_window, first_key=documents
            )
        else:
            output = flex_sink_attention(query, key, value, sinks, self.softmax_scale, tile_masks[self.sliding_window])
        mixed: Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return mixed


class PuzzleBlock(Block):
    """AutoModel's gpt-oss block, built from one layer's own experts and window."""

    def __init__(self, layer: int, config: GptOssConfig, moe_config: MoEConfig, backend: BackendConfig) -> None:
        super().__init__(layer, config, moe_config, backend)
        self.self_attn = PuzzleAttention(config, backend, use_sliding_attention=config.sliding_window is not None)
        self.mlp.experts = StreamedExperts(replace(moe_config, dtype=torch.bfloat16), backend)
        # AutoModel's name for parameters that a cast of the whole model leaves alone
        self.mlp.experts._preserve_parameter_dtypes = {
            name: torch.bfloat16 for name, _ in self.mlp.experts.named_parameters()
        }


class GptOssPuzzleModel(GptOssModel):
    """The layers of a child, without the output head."""

    def __init__(self, config: GptOssPuzzleConfig, backend: BackendConfig) -> None:
        nn.Module.__init__(self)  # AutoModel's own constructor builds equal layers, on a GPU
        self.config = config
        self.backend = backend
        self.max_seq_len = config.max_position_embeddings
        self.head_dim = config.head_dim
        dtype = _dtype(config)
        layers = [config.get_gpt_oss_config_for_layer(layer) for layer in range(config.num_hidden_layers)]
        # The one value that AutoModel's parallelizer checks: ranks share every layer if they share this many experts.
        self.moe_config = moe_config(config, gcd(*(layer.num_local_experts for layer in layers)))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id, dtype=dtype)
        self.layers = nn.ModuleDict(
            {
                str(index): PuzzleBlock(index, layer, moe_config(layer, layer.num_local_experts), backend)
                for index, layer in enumerate(layers)
            }
        )
        self.norm = initialize_rms_norm_module(
            backend.rms_norm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype
        )
        self.rotary_emb = PuzzleRotaryEmbedding(config, _default_device())

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        all_hidden: list[Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states after the final norm, [batch, token, hidden].

        Args:
            input_ids: [batch, token].
            position_ids: positions in the token's own document; a restart at 0 begins the next one.
            attention_mask: 1 for tokens, 0 for padding on the right.
            padding_mask: the contrary, if ``attention_mask`` is not given.
            all_hidden: if a list is given, what goes into each layer is appended, and the result itself.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        position_ids = position_ids.expand_as(input_ids)
        freqs_cis = position_ids_to_freqs_cis(self.rotary_emb, position_ids, for_fused_rope=False)
        documents = document_starts(position_ids)
        masks = self._tile_masks(input_ids, documents)
        hidden: Tensor = self.embed_tokens(input_ids)
        for layer in self.layers.values():
            if all_hidden is not None:
                all_hidden.append(hidden)
            hidden = layer(
                hidden,
                freqs_cis=freqs_cis,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                documents=documents,
                tile_masks=masks,
            )
        hidden = self.norm(hidden)
        if all_hidden is not None:
            all_hidden.append(hidden)
        return hidden

    def _tile_masks(self, input_ids: Tensor, documents: Tensor | None) -> dict[int | None, BlockMask] | None:
        if not runs_flex_attention(input_ids.device):
            return None
        return {
            window: tile_mask(first_keys(input_ids.shape[1], window, documents, input_ids.device))
            for window in set(self.config.windows)
        }


class GptOssPuzzleForCausalLM(GptOssForCausalLM):
    """A child with its output head, as AutoModel's recipes build, shard, load, train and save it."""

    def __init__(
        self,
        config: GptOssConfig,
        moe_config: MoEConfig | None = None,
        backend: BackendConfig | None = None,
        **_: Any,
    ) -> None:
        nn.Module.__init__(self)
        if moe_config is not None:
            raise ConfigError("a child has a mixture config per layer, out of block_configs; leave moe_config unset")
        if config.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings is true, but a gpt-oss has a head of its own; set it to false")
        if not isinstance(config, GptOssPuzzleConfig):
            config = GptOssPuzzleConfig.from_dict(config.to_dict())
        self.config = config
        self.backend = backend or BackendConfig(attn="flex")
        if self.backend.attn != "flex":
            raise ConfigError(
                f"backend.attn {self.backend.attn!r} cannot keep packed documents apart under windows and sinks; "
                "set backend.attn to 'flex'"
            )
        self.model = GptOssPuzzleModel(config, self.backend)
        self.lm_head = initialize_linear_module(
            self.backend.linear, config.hidden_size, config.vocab_size, bias=False, dtype=_dtype(config)
        )
        self.state_dict_adapter = PuzzleStateDictAdapter(
            config, self.model.moe_config, self.backend, dtype=_dtype(config)
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *_: Any, **kwargs: Any) -> "GptOssPuzzleForCausalLM":
        """A model of a checkpoint's sizes, without its weights: AutoModel's recipes load those after sharding."""
        return cls(read_config(Path(pretrained_model_name_or_path)), **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' class: ``hidden_states`` is what went into each layer, then the final norm's output."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_hidden: list[Tensor] | None = [] if wanted else None
        hidden = self.model(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            padding_mask=padding_mask,
            all_hidden=all_hidden,
        )
        logits = self.lm_head(_kept(hidden, logits_to_keep).to(_compute_dtype(self.lm_head)))
        return CausalLMOutputWithPast(logits=logits, hidden_states=None if all_hidden is None else tuple(all_hidden))

    @torch.no_grad()
    def initialize_weights(self, buffer_device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Random weights where the parameters are: in the config's type, if no other is asked for; experts in bfloat16.

        AutoModel's own defaults are a GPU, and bfloat16, in which steps as small as a policy's would be rounded away.
        """
        super().initialize_weights(buffer_device or self.lm_head.weight.device, dtype or _dtype(self.config))
        for part in self.modules():
            if isinstance(part, StreamedExperts):
                part.to(torch.bfloat16)


def moe_config(config: GptOssConfig, num_experts: int) -> MoEConfig:
    """AutoModel's description of a gpt-oss mixture layer of ``num_experts``, with all balancing switched off."""
    return MoEConfig(
        n_routed_experts=num_experts,
        n_activated_experts=config.num_experts_per_tok,
        n_shared_experts=0,
        n_expert_groups=0,
        n_limited_groups=0,
        train_gate=True,  # whether the router learns is requires_grad's business, as for every other tensor
        gate_bias_update_factor=0,
        aux_loss_coeff=0,
        score_func="softmax",
        route_scale=1.0,
        dim=config.hidden_size,
        inter_dim=config.intermediate_size,
        moe_inter_dim=config.intermediate_size,
        norm_topk_prob=False,
        router_bias=True,
        expert_bias=True,
        expert_activation="quick_geglu",
        activation_alpha=1.702,
        activation_limit=getattr(config, "swiglu_limit", 7.0),
        dtype=_dtype(config),
    )


def read_config(directory: Path) -> GptOssPuzzleConfig:
    """The config of a child, or of a parent as a child."""
    config = as_class(read_config_file(directory) | {"model_type": GPT_OSS.child_type})
    assert isinstance(config, GptOssPuzzleConfig), "it is the class of that type"
    return config


def register() -> None:
    """Let AutoModel's auto classes build children and parents of this class; repeating it changes nothing."""
    whole_model.register()
    for architecture in (GPT_OSS.child_class, GptOssForCausalLM.__name__):
        ModelRegistry.register(architecture, GptOssPuzzleForCausalLM, exist_ok=True)


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted; all for 0, without a slice, which a sharded tensor would not take."""
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden


def _compute_dtype(head: nn.Module) -> torch.dtype:
    """What the head computes in: under FSDP its policy says so, before the weights are in that type."""
    policy = head._get_fsdp_state()._mp_policy.param_dtype if isinstance(head, FSDPModule) else None
    return policy or next(head.parameters()).dtype


def _dtype(config: GptOssConfig) -> torch.dtype:
    dtype: torch.dtype = dtype_from_str(config.dtype, torch.bfloat16)
    return dtype


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

"""A GLM-4.5 child in transformers: the family's own layers, each built from its own block.

Four things differ from ``Glm4MoeForCausalLM``: layers are built one by one from ``block_configs``, shared experts keep
their width where the others are narrower, there is one attention mask per distinct window, and the cache has one entry
per layer with that layer's window. This file travels inside every child checkpoint; it depends on transformers alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, Glm4MoeConfig, Glm4MoeForCausalLM, Glm4MoeModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeDecoderLayer,
    Glm4MoeMLP,
    Glm4MoePreTrainedModel,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_glm4_moe_puzzle import Glm4MoePuzzleConfig

# On disk every expert has tensors of its own, in memory they are one; how, the parent's type says.
register_checkpoint_conversion_mapping(
    Glm4MoePuzzleConfig.model_type, get_checkpoint_conversion_mapping("glm4_moe"), overwrite=True
)


def new_cache(config: Glm4MoePuzzleConfig) -> DynamicCache:
    """An empty KV cache: a window layer keeps its window's tokens, a full layer all of them."""
    cache = DynamicCache()
    cache.layers = [
        DynamicLayer() if window is None else DynamicSlidingWindowLayer(window) for window in config.windows
    ]
    cache.layer_class_to_replicate = None
    return cache


class Glm4MoePuzzleDecoderLayer(Glm4MoeDecoderLayer):
    """One layer, whose shared experts are as wide as ``shared_expert_intermediate_size`` says, if it does."""

    def __init__(self, config: Glm4MoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = getattr(config, "shared_expert_intermediate_size", None)
        if width is not None and hasattr(self.mlp, "shared_experts"):
            self.mlp.shared_experts = Glm4MoeMLP(config, intermediate_size=width)


class Glm4MoePuzzleModel(Glm4MoeModel):
    """The layers of a child, without the output head."""

    config: Glm4MoePuzzleConfig

    def __init__(self, config: Glm4MoePuzzleConfig) -> None:
        Glm4MoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self._build_layer(layer) for layer in range(config.num_hidden_layers))
        self.norm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Glm4MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def _build_layer(self, layer: int) -> Glm4MoePuzzleDecoderLayer:
        block = Glm4MoePuzzleDecoderLayer(self.config.config_for_layer(layer), layer)
        # The layer keeps its own sizes; which kernels to use it reads from the model's config, where that may be set.
        block.self_attn.config = self.config
        if hasattr(block.mlp, "experts"):
            block.mlp.experts.config = self.config
        return block

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As in GLM-4.5; ``past_key_values`` must come from ``new_cache``."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        masks = self._masks(hidden, attention_mask, past_key_values)
        position_embeddings = self.rotary_emb(hidden, position_ids)
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            hidden = layer(
                hidden,
                attention_mask=masks[window],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                sliding_window=window,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _masks(
        self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> dict[int | None, Tensor | None]:
        """One mask per distinct window, sized by the first layer that has it."""
        masks: dict[int | None, Tensor | None] = {}
        for layer, window in enumerate(self.config.windows):
            if window not in masks:
                create = create_causal_mask if window is None else create_sliding_window_causal_mask
                masks[window] = create(
                    self.config.config_for_layer(layer), hidden, attention_mask, cache, layer_idx=layer
                )
        return masks


class Glm4MoePuzzleForCausalLM(Glm4MoeForCausalLM):
    """A child with its output head; ``generate`` works as for any model."""

    config: Glm4MoePuzzleConfig
    config_class = Glm4MoePuzzleConfig
    _keys_to_ignore_on_load_unexpected = (r"\.self_attn\.[kv]_scale$",)  # of the FP8 KV cache, for serving engines

    def __init__(self, config: Glm4MoePuzzleConfig) -> None:
        Glm4MoePreTrainedModel.__init__(self, config)
        self.model = Glm4MoePuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """``generate`` would make one window for all layers; give it the cache that knows each layer's own."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has one window; leave it unset"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = new_cache(self.config)

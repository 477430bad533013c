"""A GLM-4.5 child in vLLM: the engine's own layers, each built from its own block.

Four things differ from the engine's ``Glm4MoeForCausalLM``: layer i is built with its own number and width of experts
and its own experts per token, shared experts keep their width where the others are narrower, attention has its own
window, and weights that are missing or of another shape are refused, which the engine would leave as they were made or
fill in part. Scales of an FP8 cache are not read.

Written to ``vllm.model_executor.models.glm4_moe`` of vLLM 0.32; it was never run on a GPU.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models import glm4_moe
from vllm.model_executor.models.utils import extract_layer_index

from .engine_checks import Shape, begin_draws_anew_on_cpus, check_expert_ranks, load_whole


class Glm4MoePuzzleMLP(glm4_moe.Glm4MoeMLP):
    """A feed-forward network, which as shared experts has the width that the config names."""

    def __init__(self, hidden_size: int, intermediate_size: int, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        if prefix.endswith(".shared_experts"):
            intermediate_size = get_current_vllm_config().model_config.hf_config.shared_expert_intermediate_size
        super().__init__(hidden_size, intermediate_size, *args, prefix=prefix, **kwargs)


class Glm4MoePuzzleLayer(glm4_moe.Glm4MoeDecoderLayer):
    """One layer, with its own experts, experts per token, expert width and window (None: full)."""

    def __init__(self, config: Any, cache_config: Any = None, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        block, own_cache = config.config_for_layer(extract_layer_index(prefix)), copy.copy(cache_config)
        own_cache.sliding_window = block.sliding_window  # the engine's attention takes its window from there
        super().__init__(block, own_cache, *args, prefix=prefix, **kwargs)


class Glm4MoePuzzleForCausalLM(glm4_moe.Glm4MoeForCausalLM):
    """A child with its output head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_expert_ranks(vllm_config.model_config.hf_config, vllm_config.parallel_config)
        begin_draws_anew_on_cpus()
        # The engine's model names its layers' classes nowhere but in its module.
        with patch.multiple(glm4_moe, Glm4MoeDecoderLayer=Glm4MoePuzzleLayer, Glm4MoeMLP=Glm4MoePuzzleMLP):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vllm_config = vllm_config

    def extract_moe_parameters(self, example_moe: Any) -> None:
        """What rebalancing of experts asks for; a stack of dense layers, which is timed, has none."""
        if example_moe is not None:
            super().extract_moe_parameters(example_moe)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load them; see ``load_whole``."""
        load_format = self.vllm_config.load_config.load_format
        loaded: set[str] = load_whole(super().load_weights, weights, dict(_shapes(self.config)), load_format)
        return loaded


def _shapes(config: Any) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the checkpoint and its shape."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield from (("model.embed_tokens.weight", (vocabulary, hidden)), ("lm_head.weight", (vocabulary, hidden)))
    yield "model.norm.weight", (hidden,)
    for layer, block in enumerate(config.block_configs):
        shapes = _attention_shapes(config) | {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if experts := block["num_local_experts"]:
            shapes |= {"mlp.gate.weight": (experts, hidden), "mlp.gate.e_score_correction_bias": (experts,)}
            shapes |= _gated_shapes("mlp.shared_experts", config.shared_expert_intermediate_size, hidden)
            for expert in range(experts):
                shapes |= _gated_shapes(f"mlp.experts.{expert}", block["intermediate_size"], hidden)
        else:
            shapes |= _gated_shapes("mlp", config.intermediate_size, hidden)
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in shapes.items())


def _attention_shapes(config: Any) -> dict[str, Shape]:
    hidden, head = config.hidden_size, config.head_dim
    outputs = {"q": config.num_attention_heads * head} | dict.fromkeys("kv", config.num_key_value_heads * head)
    shapes: dict[str, Shape] = {"self_attn.o_proj.weight": (hidden, outputs["q"])}
    for name, rows in outputs.items():
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if config.attention_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if config.use_qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    return shapes


def _gated_shapes(name: str, width: int, hidden: int) -> dict[str, Shape]:
    """Of a feed-forward network with a gate."""
    into: dict[str, Shape] = {f"{name}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
    return into | {f"{name}.down_proj.weight": (hidden, width)}

"""A Qwen3-MoE child in vLLM: the engine's own layers, each built from its own block.

Three things differ from the engine's ``Qwen3MoeForCausalLM``: layer i is built with its own number and width of experts
and its own experts per token, its attention has its own window, and weights that are missing or of another shape are
refused, which the engine would leave as they were made or fill in part. Scales of an FP8 cache are not read.

Written to ``vllm.model_executor.models.qwen3_moe`` of vLLM 0.32; it was never run on a GPU.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM, Qwen3MoeModel
from vllm.model_executor.models.utils import extract_layer_index, maybe_prefix

from .engine_checks import Shape, begin_draws_anew_on_cpus, check_expert_ranks, load_whole


class Qwen3MoePuzzleLayer(Qwen3MoeDecoderLayer):
    """One layer, with its own experts, experts per token, expert width and window (None: full)."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        view = copy.copy(vllm_config)
        view.model_config, view.cache_config = copy.copy(vllm_config.model_config), copy.copy(vllm_config.cache_config)
        block = vllm_config.model_config.hf_config.config_for_layer(extract_layer_index(prefix))
        view.model_config.hf_config = view.model_config.hf_text_config = block
        view.cache_config.sliding_window = block.sliding_window  # the engine's attention takes its window from there
        super().__init__(vllm_config=view, prefix=prefix, **kwargs)


class Qwen3MoePuzzleForCausalLM(Qwen3MoeForCausalLM):
    """A child with its output head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the engine's own __init__ would build layers that are all alike
        self.vllm_config = vllm_config
        self.config, self.quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        check_expert_ranks(self.config, vllm_config.parallel_config)
        begin_draws_anew_on_cpus()
        self.model = Qwen3MoeModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), decoder_layer_type=Qwen3MoePuzzleLayer
        )
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load them; see ``load_whole``."""
        load_format = self.vllm_config.load_config.load_format
        loaded: set[str] = load_whole(super().load_weights, weights, dict(_shapes(self.config)), load_format)
        return loaded


def _shapes(config: Any) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the checkpoint and its shape."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield from (
        ("model.embed_tokens.weight", (config.vocab_size, hidden)),
        ("lm_head.weight", (config.vocab_size, hidden)),
    )
    yield "model.norm.weight", (hidden,)
    for layer, block in enumerate(config.block_configs):
        inner, experts = block["intermediate_size"], block["num_local_experts"]
        shapes: dict[str, Shape] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (config.head_dim,),
            "self_attn.k_norm": (config.head_dim,),
            "mlp.gate": (experts, hidden),
        }
        for expert in range(experts):
            for part in ("gate", "up"):
                shapes[f"mlp.experts.{expert}.{part}_proj"] = (inner, hidden)
            shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, inner)
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items())

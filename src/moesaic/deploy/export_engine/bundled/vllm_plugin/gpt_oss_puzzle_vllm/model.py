"""A gpt-oss child in vLLM: the engine's own gpt-oss layers, each built from its own block.

Five things differ from the engine's ``GptOssForCausalLM``: layer i is built with its own number and width of experts,
its attention has its own window instead of one on every even layer, its weights are loaded with its own sizes, the
scales of an FP8 KV cache are read from the checkpoint, which the engine's MXFP4 models skip without a word, and weights
that are missing or of another shape are refused, which the engine would leave at zero or fill in part.

Written to ``vllm.model_executor.models.gpt_oss`` of vLLM 0.29 to 0.33. vLLM 0.29 and 0.32 for CPUs serve with it; it
was never run on a GPU.
"""

import copy
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM, GptOssModel, OAIAttention, TransformerBlock
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index, maybe_prefix
from vllm.v1.attention.backend import AttentionType

from .engine_checks import begin_draws_anew_on_cpus, check_expert_ranks

_SCALES = (".k_scale", ".v_scale")
_NOT_STORED = (".q_scale", ".prob_scale")
"""Parameters that the engine makes for itself."""


class KvScales(QuantizationConfig):
    """A quantisation of attention alone: it lets the checkpoint's scales of K and V be loaded and kept."""

    def get_name(self) -> str:
        """A name that is no other's."""
        return "gpt_oss_puzzle_kv"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """As for MXFP4."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """It has none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KvScales":
        """There is nothing to configure."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Scales of the KV cache, to be loaded."""
        return BaseKVCacheMethod(self)


class GptOssPuzzleAttention(OAIAttention):
    """Attention with its own window (None: full)."""

    def _build_attention(self, config: Any, cache_config: Any, quant_config: Any, prefix: str) -> nn.Module:
        attention: nn.Module = Attention(
            self.num_local_attention_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_local_key_value_heads,
            cache_config=cache_config,
            quant_config=KvScales(),
            per_layer_sliding_window=config.sliding_window,
            attn_type=AttentionType.DECODER,
            prefix=f"{prefix}.attn",
            sinks=self.sinks,
        )
        return attention


class GptOssPuzzleBlock(TransformerBlock):
    """One layer, with its own experts, experts per token, expert width and window."""

    attention_cls = GptOssPuzzleAttention

    def __init__(self, vllm_config: VllmConfig, quant_config: Any, prefix: str = "") -> None:
        view = copy.copy(vllm_config)
        view.model_config = copy.copy(vllm_config.model_config)
        whole = vllm_config.model_config.hf_config
        view.model_config.hf_config = whole.get_gpt_oss_config_for_layer(extract_layer_index(prefix))
        super().__init__(view, quant_config, prefix)


class GptOssPuzzleModel(GptOssModel):
    """Embedding, layers and final norm."""

    block_cls = GptOssPuzzleBlock
    config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen: set[str] = set()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load layer by layer: the engine's loader reads the sizes of experts from ``self.config``.

        Raises:
            ValueError: if a weight has another shape than its layer.
        """
        whole, loaded = self.config, set[str]()
        try:
            for layer, part in groupby(weights, key=lambda named: _layer_of(named[0])):
                self.config = whole if layer is None else whole.get_gpt_oss_config_for_layer(layer)
                loaded |= super().load_weights(_of_right_shape(part, self.config, self._seen))
        finally:
            self.config = whole
        return loaded

    def check_names(self) -> None:
        """The engine leaves what is missing as it was made, and passes over what it does not know: both are refused.

        Raises:
            ValueError: if a weight is missing, or is not of this model.
        """
        expected = set()
        for name, _ in self.named_parameters():
            name = name.replace(".routed_experts.", ".")
            if not name.endswith(_NOT_STORED) and (self._reads_scales or not name.endswith(_SCALES)):
                expected |= {name.replace("qkv_proj", f"{part}_proj") for part in "qkv"}
        if missing := sorted(expected - self._seen):
            raise ValueError(f"the checkpoint has no weights for {missing[0]}")
        here = range(self.start_layer, self.end_layer)
        strange = (name for name in self._seen - expected if not name.endswith(_SCALES))
        if unknown := sorted(name for name in strange if (layer := _layer_of(name)) is None or layer in here):
            raise ValueError(f"the checkpoint has weights that this model has not: {unknown[0]}")

    @property
    def _reads_scales(self) -> bool:
        return str(self.layers[self.start_layer].attn.attn.kv_cache_dtype).startswith("fp8")


def _of_right_shape(weights: Iterable[tuple[str, Tensor]], config: Any, seen: set[str]) -> Iterable[tuple[str, Tensor]]:
    """The same, noting names; where the engine would copy a part of a weight, its shape must be right."""
    experts, inner, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
    shapes = {"w13": (experts, 2 * inner), "w2": (experts, hidden), "sinks": (config.num_attention_heads,)}
    unpacked = {"w13": (experts, hidden, 2 * inner), "w2": (experts, inner, hidden)}
    for name, weight in weights:
        is_unpacked = weight.ndim == 3 and weight.is_floating_point()
        shape = (unpacked if is_unpacked else shapes).get(name.rsplit(".", 1)[-1].split("_")[0])
        if shape is not None and weight.shape[: len(shape)] != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, its layer's config asks for {shape}")
        seen.add(name)
        yield name, weight


def _layer_of(name: str) -> int | None:
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


class GptOssPuzzleForCausalLM(GptOssForCausalLM):
    """A child with its output head."""

    hf_to_vllm_mapper = GptOssForCausalLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"\.self_attn\.([kv])_scale$"): r".self_attn.attn.\1_scale"}
    )

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the engine's own __init__ would build layers that are all alike
        self.vllm_config = vllm_config
        self.config = vllm_config.model_config.hf_config
        check_expert_ranks(self.config, vllm_config.parallel_config)
        begin_draws_anew_on_cpus()
        self.model = GptOssPuzzleModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load them; ValueError unless they are this model's, each and every one.

        A model made of dummies gets its weights from a trainer, in parts: then a part may be all there is.
        """
        loaded: set[str] = super().load_weights(weights)
        if self.vllm_config.load_config.load_format != "dummy":
            self.model.check_names()
        return loaded

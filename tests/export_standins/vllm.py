"""A stand-in of vLLM 0.33: its gpt-oss, its plug-in interface, and how weights find their way into a model."""

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.export_standins import install

UNSET = -1.0
"""A scale that the checkpoint has not given."""
MODELS_CONFIG_MAP: dict[str, Any] = {}


class ModelRegistry:
    """Model classes by architecture name."""

    models: dict[str, str] = {}  # noqa: RUF012

    @classmethod
    def register_model(cls, model_arch: str, model_cls: str) -> None:
        """Remember where a class is; it is imported when it is needed."""
        cls.models[model_arch] = model_cls


class GptOssForCausalLMConfig:
    """What the engine changes in a gpt-oss model's settings."""


@dataclass
class VllmConfig:
    """The engine's settings."""

    model_config: Any
    quant_config: Any = None
    cache_config: Any = None
    parallel_config: Any = None


@dataclass
class WeightsMapper:
    """From a checkpoint's names to the engine's: expressions first, then parts, then endings."""

    orig_to_new_regex: Mapping[re.Pattern[str], str] = field(default_factory=dict)
    orig_to_new_substr: Mapping[str, str] = field(default_factory=dict)
    orig_to_new_suffix: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: "WeightsMapper") -> "WeightsMapper":
        return WeightsMapper(
            {**self.orig_to_new_regex, **other.orig_to_new_regex},
            {**self.orig_to_new_substr, **other.orig_to_new_substr},
            {**self.orig_to_new_suffix, **other.orig_to_new_suffix},
        )

    def map_name(self, name: str) -> str:
        """One name."""
        for pattern, new in self.orig_to_new_regex.items():
            name = pattern.sub(new, name)
        for old, new in self.orig_to_new_substr.items():
            name = name.replace(old, new, 1)
        for old, new in self.orig_to_new_suffix.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name


class QuantizationConfig:
    """How layers are quantised."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method for a layer, None for none."""
        raise NotImplementedError


class _GptOssMxfp4Config(QuantizationConfig):
    """What gpt-oss gets: its experts are packed, its attention has no method."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        return None


class BaseKVCacheMethod:
    """Lets the scales of a cache be loaded."""

    def __init__(self, quant_config: QuantizationConfig) -> None:
        self.quant_config = quant_config

    def create_weights(self, layer: nn.Module) -> None:
        """Add the scales to an attention layer's parameters."""
        layer.k_scale = nn.Parameter(torch.tensor(UNSET), requires_grad=False)
        layer.v_scale = nn.Parameter(torch.tensor(UNSET), requires_grad=False)


class Attention(nn.Module):
    """The attention kernel with its cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        cache_config: Any = None,
        quant_config: QuantizationConfig | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        attn_type: str = "decoder",
        sinks: Tensor | None = None,
    ) -> None:
        super().__init__()
        model_wide: int | None = cache_config.sliding_window
        self.sliding_window = model_wide if per_layer_sliding_window is None else per_layer_sliding_window
        if quant_config is not None and (method := quant_config.get_quant_method(self, prefix)) is not None:
            method.create_weights(self)


class OAIAttention(nn.Module):
    """Attention with the engine's own rule for windows."""

    def __init__(self, config: Any, quant_config: Any = None, cache_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.layer_idx = extract_layer_index(prefix)
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        rope = config.rope_parameters
        self.rope = [rope[key] for key in ("rope_theta", "factor", "original_max_position_embeddings")]
        self.rope += [rope["beta_fast"], rope["beta_slow"]]
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads), requires_grad=False)
        self.num_local_attention_heads = config.num_attention_heads
        self.num_local_key_value_heads = config.num_key_value_heads
        self.attn = self._build_attention(config, cache_config, quant_config, prefix)

    def _build_attention(self, config: Any, cache_config: Any, quant_config: Any, prefix: str) -> nn.Module:
        window = config.sliding_window if self.layer_idx % 2 == 0 else None
        return Attention(
            self.num_local_attention_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_local_key_value_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
            sinks=self.sinks,
        )


class MLPBlock(nn.Module):
    """Router and experts."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str = "") -> None:
        super().__init__()
        self.num_experts: int = vllm_config.model_config.hf_config.num_local_experts
        self.num_loaded = 0


class TransformerBlock(nn.Module):
    """One layer."""

    attention_cls: type[nn.Module] = OAIAttention
    mlp_cls: type[nn.Module] = MLPBlock

    def __init__(self, vllm_config: VllmConfig, quant_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.attn = self.attention_cls(
            config, quant_config=quant_config, cache_config=vllm_config.cache_config, prefix=f"{prefix}.attn"
        )
        self.mlp = self.mlp_cls(vllm_config, extract_layer_index(prefix), prefix=f"{prefix}.mlp")

    def built(self) -> dict[str, Any]:
        """What this layer is."""
        cache: Any = self.attn.attn
        experts = self.mlp
        scales = [float(cache.k_scale), float(cache.v_scale)] if hasattr(cache, "k_scale") else [UNSET, UNSET]
        return {
            "num_experts": experts.num_experts,
            "num_loaded": experts.num_loaded,
            "window": cache.sliding_window,
            "rope": self.attn.rope,
            "scales": scales,
        }


class GptOssModel(nn.Module):
    """Embedding, layers that are all alike, final norm."""

    block_cls: type[nn.Module] = TransformerBlock

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.layers = nn.ModuleList(
            self.block_cls(vllm_config, prefix=f"{prefix}.layers.{layer}", quant_config=self.quant_config)
            for layer in range(self.config.num_hidden_layers)
        )
        self.make_empty_intermediate_tensors = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Experts are counted by the config; what has no parameter is passed over, without a word."""
        params, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name.endswith((".w2_weight", ".w13_weight")):
                if tensor.shape[0] != self.config.num_local_experts:
                    raise RuntimeError(
                        f"{name} has {tensor.shape[0]} experts, the config says {self.config.num_local_experts}"
                    )
                layer: Any = self.layers[int(name.split(".")[1])]
                layer.mlp.num_loaded = tensor.shape[0]
            elif name in params and not tensor.is_meta:
                params[name].data.copy_(tensor.reshape(params[name].shape))
            loaded.add(name)
        return loaded


class GptOssForCausalLM(nn.Module):
    """The engine's own gpt-oss."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".self_attn.": ".attn."},
        orig_to_new_suffix={
            ".gate_up_proj_blocks": ".w13_weight",
            ".down_proj_blocks": ".w2_weight",
            ".gate_up_proj_scales": ".w13_weight_scale",
            ".down_proj_scales": ".w2_weight_scale",
            ".gate_up_proj": ".w13_weight",
            ".down_proj": ".w2_weight",
        },
    )

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = GptOssModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Rename and hand on what belongs to the layers."""
        renamed = ((self.hf_to_vllm_mapper.map_name(name), tensor) for name, tensor in weights)
        inner = ((name.removeprefix("model."), tensor) for name, tensor in renamed if name.startswith("model.layers."))
        loaded: set[str] = self.model.load_weights(inner)
        return loaded


class _Sized(nn.Module):
    """The output head and what follows it."""

    def __init__(self, *sizes: int, prefix: str = "") -> None:
        super().__init__()


def extract_layer_index(prefix: str) -> int:
    """The layer that a module's name is in."""
    (index,) = (int(part) for part in prefix.split(".") if part.isdigit())
    return index


def maybe_prefix(prefix: str, name: str) -> str:
    """A module's full name."""
    return f"{prefix}.{name}" if prefix else name


def enter() -> None:
    """From now on ``import vllm`` finds this."""
    layers, models = "vllm.model_executor.layers", "vllm.model_executor.models"
    install(
        {
            "vllm": {"ModelRegistry": ModelRegistry},
            "vllm.config": {"VllmConfig": VllmConfig},
            f"{layers}.attention": {"Attention": Attention},
            f"{layers}.logits_processor": {"LogitsProcessor": _Sized},
            f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": _Sized},
            f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
            f"{layers}.quantization.kv_cache": {"BaseKVCacheMethod": BaseKVCacheMethod},
            f"{models}.gpt_oss": {
                "GptOssForCausalLM": GptOssForCausalLM,
                "GptOssModel": GptOssModel,
                "MLPBlock": MLPBlock,
                "OAIAttention": OAIAttention,
                "TransformerBlock": TransformerBlock,
            },
            f"{models}.utils": {
                "WeightsMapper": WeightsMapper,
                "extract_layer_index": extract_layer_index,
                "maybe_prefix": maybe_prefix,
            },
            f"{models}.config": {
                "MODELS_CONFIG_MAP": MODELS_CONFIG_MAP,
                "GptOssForCausalLMConfig": GptOssForCausalLMConfig,
            },
            "vllm.v1.attention.backend": {"AttentionType": SimpleNamespace(DECODER="decoder")},
        }
    )


def build(config: Any, weights: Mapping[str, Tensor], num_expert_ranks: int = 1) -> list[dict[str, Any]]:
    """Build the registered model of this config as the engine does, load it, and tell what each layer is.

    Raises:
        ValueError: if the engine would take the model for something else than gpt-oss.
    """
    (architecture,) = config.architectures
    if config.model_type != "gpt_oss" or architecture not in MODELS_CONFIG_MAP:
        raise ValueError("the plugin does not say that the model is a gpt-oss; vLLM would pick other MXFP4 kernels")
    module, name = ModelRegistry.models[architecture].split(":")
    kinds = set(config.layer_types)
    model_wide = config.sliding_window if kinds == {"sliding_attention"} else None
    engine = VllmConfig(
        model_config=SimpleNamespace(hf_config=config),
        quant_config=_GptOssMxfp4Config(),
        cache_config=SimpleNamespace(sliding_window=model_wide),
        parallel_config=SimpleNamespace(
            enable_expert_parallel=num_expert_ranks > 1, tensor_parallel_size=num_expert_ranks, data_parallel_size=1
        ),
    )
    model: Any = getattr(importlib.import_module(module), name)(vllm_config=engine)
    model.load_weights(weights.items())
    return [block.built() for block in model.model.layers]

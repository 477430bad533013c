"""A stand-in of TensorRT-LLM's PyTorch backend: gpt-oss as in 1.2 and in 1.3's release candidates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.export_standins import install

REGISTERED: dict[str, type[nn.Module]] = {}
"""Model classes by architecture name."""
_RENAMED = {
    "embedding": "embed_tokens",
    "attn.norm": "input_layernorm",
    "attn": "self_attn",
    "mlp.norm": "post_attention_layernorm",
    "block": "layers",
    "gate": "router",
}
"""The engine's names for a checkpoint's; the order matters."""


@dataclass
class Parallelism:
    """How the model lies on GPUs."""

    pp_size: int = 1
    moe_ep_size: int = 1


@dataclass
class ModelConfig:
    """The engine's settings of a model; once frozen, only another model config may be put in."""

    pretrained_config: Any
    mapping: Parallelism = field(default_factory=Parallelism)
    frozen: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "frozen", False) and name != "pretrained_config":
            raise AttributeError(f"ModelConfig is frozen, {name} cannot be set")
        super().__setattr__(name, value)


def register_auto_model(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Remember a model class."""

    def remember(model: type[nn.Module]) -> type[nn.Module]:
        REGISTERED[name] = model
        return model

    return remember


class Loaded(nn.Module):
    """A module with parameters of some names; it remembers the shapes of what was loaded into it."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(0), requires_grad=False))
        self.shapes: dict[str, tuple[int, ...]] = {}

    def load_weights(self, weights: list[Mapping[str, Any]]) -> None:
        """Take what stands under the parameters' names."""
        for given in weights:
            for name in self._parameters:
                self.shapes[name] = tuple(given[name].shape)


class MoE(Loaded):
    """A layer's experts."""

    def __init__(self, num_experts: int, intermediate_size: int) -> None:
        super().__init__("w3_w1_weight")
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.num_loaded = 0

    def load_weights(self, weights: list[Mapping[str, Any]]) -> None:
        """Take the experts that there are places for; more are ignored, as the engine does."""
        self.num_loaded = len(weights[0]["down_proj"][: self.num_experts])


class AttentionBlock(Loaded):
    """Attention with the engine's own rule for windows."""

    def __init__(self, config: ModelConfig, layer_idx: int = 0, use_custom_cublas_mm: bool = False) -> None:
        super().__init__("sinks")
        whole = config.pretrained_config
        self.rope = (
            whole.rope_theta,
            *(whole.rope_scaling[key] for key in ("factor", "original_max_position_embeddings")),
            *(whole.rope_scaling[key] for key in ("beta_fast", "beta_slow")),
        )
        self.sliding_window = whole.sliding_window if layer_idx % 2 == 0 else None
        self.qkv_proj, self.o_proj = Loaded("weight", "bias"), Loaded("weight", "bias")
        self.norm = Loaded("weight")

    def forward(self) -> int | None:
        """The window that goes to the kernel."""
        window: int | None = self.sliding_window
        return window


class MLPBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = Loaded("weight")
        self.gate = Loaded("weight", "bias")
        self.experts = MoE(config.pretrained_config.num_local_experts, config.pretrained_config.intermediate_size)
        self.top_k = config.pretrained_config.num_experts_per_tok


class TransformerBlock(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig, layer_idx: int, use_custom_cublas_mm: bool = False) -> None:
        super().__init__()
        self.attn = AttentionBlock(config, layer_idx, use_custom_cublas_mm)
        self.mlp = MLPBlock(config, layer_idx)

    def built(self) -> dict[str, Any]:
        """What this layer is."""
        experts, router = self.mlp.experts, self.mlp.gate.shapes.get("weight", (0,))
        return {
            "num_experts": experts.num_experts,
            "num_loaded": min(experts.num_loaded, router[0]),
            "experts_per_token": self.mlp.top_k,
            "expert_width": experts.intermediate_size,
            "window": self.attn(),
            "rope": list(self.attn.rope),
        }


class Transformer(nn.Module):
    """Embedding, layers that are all alike, final norm."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.model_config = model_config
        self.use_custom_cublas_mm = False
        self.embedding = Loaded("weight")
        self.block = nn.ModuleList(
            TransformerBlock(model_config, layer, self.use_custom_cublas_mm)
            for layer in range(model_config.pretrained_config.num_hidden_layers)
        )
        self.norm = Loaded("weight")


class SpecDecOneEngineForCausalLM(nn.Module):
    """A model with its output head."""

    def __init__(self, model: Transformer, model_config: ModelConfig) -> None:
        super().__init__()
        self.model, self.model_config = model, model_config
        self.lm_head = Loaded("weight")

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model_config.pretrained_config


class GptOssForCausalLM(SpecDecOneEngineForCausalLM):
    """The engine's own gpt-oss."""

    hf_params_map = _RENAMED

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__(Transformer(model_config), model_config)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load a Hugging Face checkpoint."""
        self.load_hf_weights(weights)

    def load_hf_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Every module takes what stands under its name; experts are counted by the config."""
        num_experts = self.config.num_local_experts
        for name, module in list(self.named_modules()):
            if not module._parameters:
                continue
            for own, theirs in self.hf_params_map.items():
                name = name.replace(own, theirs)
            if isinstance(module, MoE):
                module.load_weights([_experts(_under(name, weights), num_experts)])
            elif "qkv" in name:
                module.load_weights([_under(name.replace("qkv_proj", f"{part}_proj"), weights) for part in "qkv"])
            else:
                module.load_weights([_under(name, weights)])


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in weights.items() if name.startswith(f"{prefix}.")}


def _experts(found: Mapping[str, Tensor], num_experts: int) -> dict[str, list[Tensor]]:
    packed = "down_proj_blocks" in found
    endings = ("_blocks", "_scales", "_bias") if packed else ("", "_bias")
    names = [f"{projection}{ending}" for projection in ("gate_up_proj", "down_proj") for ending in endings]
    return {name.removesuffix("_blocks"): [found[name][expert] for expert in range(num_experts)] for name in names}


def enter() -> None:
    """From now on ``import tensorrt_llm`` finds this."""
    models = "tensorrt_llm._torch.models"
    install(
        {
            "tensorrt_llm._torch.model_config": {"ModelConfig": ModelConfig},
            f"{models}.modeling_gpt_oss": {
                "AttentionBlock": AttentionBlock,
                "MLPBlock": MLPBlock,
                "TransformerBlock": TransformerBlock,
                "Transformer": Transformer,
                "GptOssForCausalLM": GptOssForCausalLM,
            },
            f"{models}.modeling_utils": {"register_auto_model": register_auto_model},
        }
    )


def build(config: Any, weights: Mapping[str, Tensor], num_expert_ranks: int = 1) -> list[dict[str, Any]]:
    """Build the registered model of this config as the engine does, load it, and tell what each layer is."""
    model_config = ModelConfig(config, Parallelism(moe_ep_size=num_expert_ranks))
    model_config.frozen = True
    model: Any = REGISTERED[config.architectures[0]](model_config)
    model.load_weights(weights)
    return [block.built() for block in model.model.block]

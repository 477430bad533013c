"""A gpt-oss child in TensorRT-LLM: the engine's own gpt-oss layers, each built from its own block.

Three things differ from the engine's ``GptOssForCausalLM``: layer i is built with its own number and width of experts,
its attention has its own window instead of one on every even layer, and its weights are loaded with its own number of
experts. Everything else, kernels and loading included, is inherited.

Written to the PyTorch backend of TensorRT-LLM 1.2 and of 1.3's release candidates (``tensorrt_llm._torch``), with
transformers 4.57 or 5. It was checked against stand-ins of that interface; the engine itself never ran it.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tensorrt_llm._torch.models.modeling_gpt_oss import GptOssForCausalLM, Transformer, TransformerBlock
from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from transformers import AutoConfig

from .configuration_gpt_oss_puzzle import GptOssPuzzleConfig


class EngineConfig(GptOssPuzzleConfig):
    """The child's config as the engine reads it.

    The server speaks Harmony to models of type ``gpt_oss``, so that is what an instance says it is. The layers read
    ``rope_theta``, which transformers 5 keeps inside ``rope_parameters`` alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_type = "gpt_oss"
        if not hasattr(self, "rope_theta"):
            self.rope_theta = self.rope_parameters["rope_theta"]


AutoConfig.register("gpt_oss_puzzle", EngineConfig, exist_ok=True)


def _with_config(model_config: Any, config: Any) -> Any:
    """The same engine settings for another model config; registries inside stay shared."""
    view = copy.copy(model_config)
    view.pretrained_config = config
    return view


class GptOssPuzzleBlock(TransformerBlock):
    """One layer, with its own experts, experts per token, expert width and window."""

    def __init__(self, model_config: Any, layer: int, **kwargs: Any) -> None:
        config = model_config.pretrained_config.get_gpt_oss_config_for_layer(layer)
        super().__init__(_with_config(model_config, config), layer, **kwargs)
        self.attn.sliding_window = config.sliding_window  # the engine's own rule: a window on even layers only


class GptOssPuzzleTransformer(Transformer):
    """Embedding, layers and final norm."""

    def __init__(self, model_config: Any) -> None:
        no_layers = copy.copy(model_config.pretrained_config)
        no_layers.num_hidden_layers = 0
        super().__init__(_with_config(model_config, no_layers))
        self.model_config = model_config
        self.block.extend(
            GptOssPuzzleBlock(model_config, layer, use_custom_cublas_mm=self.use_custom_cublas_mm)
            for layer in range(model_config.pretrained_config.num_hidden_layers)
        )


class _Part:
    """What the engine's loader sees of the model while it loads one layer, or all that is in none."""

    def __init__(self, model: "GptOssPuzzleForCausalLM", layer: int | None) -> None:
        whole = model.model_config.pretrained_config
        self.config = whole if layer is None else whole.get_gpt_oss_config_for_layer(layer)
        self._model, self._layer = model, layer

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name, module in self._model.named_modules():
            parts = name.split(".")
            layer = int(parts[2]) if parts[:2] == ["model", "block"] and len(parts) > 2 else None
            if layer == self._layer:
                yield name, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@register_auto_model("GptOssPuzzleForCausalLM")
class GptOssPuzzleForCausalLM(GptOssForCausalLM):
    """A child with its output head."""

    def __init__(self, model_config: Any) -> None:
        mapping, config = model_config.mapping, model_config.pretrained_config
        if mapping.pp_size != 1:
            raise ValueError(f"pipeline_parallel_size is {mapping.pp_size}; the engine's gpt-oss has none: set it to 1")
        counts = {block["num_local_experts"] for block in config.block_configs}
        if uneven := sorted(count for count in counts if count % mapping.moe_ep_size):
            raise ValueError(
                f"moe_expert_parallel_size {mapping.moe_ep_size} does not divide the {uneven[0]} experts of some layers"
            )
        if config.torch_dtype is None:
            config.torch_dtype = torch.bfloat16
        # The engine's own __init__ would build layers that are all alike.
        super(GptOssForCausalLM, self).__init__(GptOssPuzzleTransformer(model_config), model_config=model_config)

    def load_hf_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load layer by layer, each with its own number of experts."""
        for layer in (None, *range(self.model_config.pretrained_config.num_hidden_layers)):
            GptOssForCausalLM.load_hf_weights(_Part(self, layer), weights)

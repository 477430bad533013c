"""MXFP4 experts on a CPU without AMX tiles, for which vLLM has no kernel: loaded packed, computed as ordinary numbers.

Each packed byte holds two e2m1 numbers, the low nibble first; 32 in a row share a scale of 2^(byte - 127). Their
products are exact in BF16, so unpacking loses nothing. Activations may be BF16, as on GPUs, or float32, in which
rounding decides nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod
from vllm.model_executor.utils import replace_parameter

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127


def register_where_needed() -> None:
    """Take the place of vLLM's own MXFP4 on a CPU that has no kernel for it."""
    if not torch.cpu._is_amx_tile_supported():
        register_quantization_config(UnpackedExpertsConfig.get_name())(UnpackedExpertsConfig)


class UnpackedExpertsConfig(GptOssMxfp4Config):
    """gpt-oss's MXFP4, whose experts are unpacked once they are loaded."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What experts compute in."""
        return [torch.bfloat16, torch.float32]

    def _make_moe_method(self, moe: FusedMoEConfig) -> "UnpackedExperts":
        return UnpackedExperts(moe)


class UnpackedExperts(UnquantizedFusedMoEMethod):
    """Loads what gpt-oss's own method loads, and computes as an unquantised model does."""

    weight_dtype = "gpt_oss_mxfp4"

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Packed parameters, as in the checkpoint."""
        GptOssMxfp4MoEMethod.create_weights(self, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Unpack, then go on as without quantisation."""
        for name in ("w13_weight", "w2_weight"):
            scales = getattr(layer, f"{name}_scale")
            unpacked = unpack(getattr(layer, name).data, scales.data)
            replace_parameter(layer, name, unpacked.to(self.moe.in_dtype))
            delattr(layer, f"{name}_scale")
        for name in ("w13_bias", "w2_bias"):  # made in BF16
            replace_parameter(layer, name, getattr(layer, name).data.to(self.moe.in_dtype))
        super().process_weights_after_loading(layer)


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    """The numbers that packed bytes stand for.

    Args:
        packed: uint8 of shape ``[..., columns / 2]``.
        scales: uint8 of shape ``[..., columns / 32]``.

    Returns:
        BF16 of shape ``[..., columns]``.
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16)
    numbers = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], dim=-1).flatten(-2)
    exponents = scales.int().sub(_SCALE_BIAS).repeat_interleave(numbers.shape[-1] // scales.shape[-1], dim=-1)
    return torch.ldexp(numbers, exponents).to(torch.bfloat16)

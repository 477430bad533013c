"""MXFP4 experts on a CPU without AMX tiles, for which vLLM has no kernel: loaded packed, computed in BF16.

Each packed byte holds two e2m1 numbers, the low nibble first; 32 in a row share a scale of 2^(byte - 127). Their
products are exact in BF16, so unpacking loses nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127


def has_no_kernel() -> bool:
    """Whether vLLM has no kernel for MXFP4 experts on this machine, and this one is needed."""
    return bool(current_platform.is_cpu()) and not torch.cpu._is_amx_tile_supported()


class UnpackedExpertsConfig(GptOssMxfp4Config):
    """gpt-oss's MXFP4, whose experts are unpacked once they are loaded."""

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
            replace_parameter(layer, name, unpack(getattr(layer, name).data, scales.data))
            delattr(layer, f"{name}_scale")
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

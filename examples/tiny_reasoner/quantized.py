"""Train through the stored form: MXFP4 expert matrices and BF16 for the rest, gradients straight through."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moesaic.models import mxfp4


def is_expert_matrix(name: str) -> bool:
    """Whether the checkpoint stores it as MXFP4."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def stored_value(name: str, parameter: Tensor) -> Tensor:
    """What the checkpoint gives back for this parameter; expert matrices are [expert, in, out], blocks run along in."""
    if is_expert_matrix(name):
        blocks, scales = mxfp4.quantize(parameter.detach().mT.contiguous())
        return mxfp4.dequantize(blocks, scales).mT.contiguous()
    return parameter.detach().to(torch.bfloat16).to(parameter.dtype)


@contextmanager
def stored_weights(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside, parameters hold their stored values; afterwards the exact ones again, with the gradients from inside."""
    if not enabled:
        yield
        return
    exact = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = stored_value(name, parameter)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = exact[name]

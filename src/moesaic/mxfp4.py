"""MXFP4: the four-bit floating-point format in which gpt-oss stores its expert weights.

A block is 32 consecutive values of one row. It holds 32 codes of four bits (e2m1: sign, two exponent bits, one mantissa
bit) and one scale of eight bits (e8m0: a power of two)::

    value = E2M1[code] * 2 ** (scale - 127),        E2M1 = 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

Two codes share a byte, the earlier value in the low nibble. Source: OCP Microscaling Formats (MX) v1.0, sections 5.3
and 6.3. Departure: the scale is the smallest power of two for which nothing in the block saturates,
``ceil(log2(amax / 6))``, where the specification's example algorithm lets the largest values clip.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BLOCK = 32
"""Values that share one scale."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST = _E2M1[-1]
_BIAS = 127
_FLUSH = 2.0**-126
"""Blocks whose scale would fall below this are stored as zeros."""
_PIECE = 2**14
"""Blocks unpacked at once: what a core's second-level cache takes. Accelerators take more."""
_PIECE_ELSEWHERE = 2**22


def quantize(
    weight: Float[Tensor, "*rows col"],
) -> tuple[UInt8[Tensor, "*rows block 16"], UInt8[Tensor, "*rows block"]]:
    """Pack ``weight`` into ``(blocks, scales)``, rounding each value to the nearest code, ties to the even code.

    Raises:
        ValueError: if the last axis is not a multiple of 32, or a value is not finite.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"MXFP4 packs rows of a multiple of {BLOCK} values, got rows of {weight.shape[-1]}")
    values = weight.float().unflatten(-1, (-1, BLOCK))
    amax = values.abs().amax(-1)
    if not torch.isfinite(amax).all():
        raise ValueError("MXFP4 cannot store infinite or NaN weights")
    exponent = torch.ceil(torch.log2((amax / _LARGEST).clamp_min(_FLUSH))).clamp(-_BIAS, _BIAS)
    magnitude = torch.ldexp(values.abs(), -exponent.unsqueeze(-1).int())
    codes = _round_to_code(magnitude) | (values.signbit().to(torch.uint8) << 3)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponent + _BIAS).to(torch.uint8)


def dequantize(
    blocks: UInt8[Tensor, "*rows block 16"], scales: UInt8[Tensor, "*rows block"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows col"]:
    """The weights that ``(blocks, scales)`` stand for; exact in float32 and in bfloat16.

    A byte is looked up as both its values at once; a piece at a time, so that little is held beside the result.
    """
    table, powers = _pair_table(dtype, blocks.device), _power_table(dtype, blocks.device)
    codes, exponents = blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)
    values = torch.empty((len(codes), BLOCK // 2), dtype=table.dtype, device=blocks.device)
    piece_size = _PIECE if blocks.device.type == "cpu" else _PIECE_ELSEWHERE
    for piece, out, power in zip(*(part.split(piece_size) for part in (codes, values, exponents)), strict=True):
        torch.index_select(table, 0, piece.flatten().int(), out=out.view(-1))
        out.view(dtype).mul_(powers.index_select(0, power.int()).unsqueeze(1))
    return values.view(dtype).view(*scales.shape[:-1], -1)


def _round_to_code(magnitude: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Count the midpoints between neighbouring magnitudes that each value passes; on a tie the even code wins."""
    codes = torch.zeros(magnitude.shape, dtype=torch.uint8, device=magnitude.device)
    for lower, (below, above) in enumerate(pairwise(_E2M1)):
        midpoint = (below + above) / 2
        codes += (magnitude > midpoint) if lower % 2 == 0 else (magnitude >= midpoint)
    return codes


def _pair_table(dtype: torch.dtype, device: torch.device) -> Int[Tensor, "256"]:
    """For every byte the two values it holds, low nibble first, as the integer of their bits."""
    signed = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((signed[byte & 15], signed[byte >> 4]), dim=-1)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


def _power_table(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256"]:
    """What every scale multiplies by."""
    exponent = torch.arange(256, device=device) - _BIAS
    return torch.ldexp(torch.ones(256, device=device), exponent).to(dtype)

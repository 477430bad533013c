"""MXFP4: the four-bit floating-point format in which gpt-oss stores its expert weights.

A block is 32 consecutive values of one row. It holds 32 codes of four bits (e2m1: sign, two exponent bits, one mantissa
bit) and one scale of eight bits (e8m0: a power of two)::

    value = E2M1[code] * 2 ** (scale - 127),        E2M1 = 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

Two codes share a byte, the earlier value in the low nibble. Source: OCP Microscaling Formats (MX) v1.0, sections 5.3
and 6.3. Departure: the scale is the smallest power of two for which nothing in the block saturates,
``ceil(log2(amax / 6))``, where the specification's example algorithm lets the largest values clip.

Both ways run a piece at a time that stays in the processor's cache, and by arithmetic on the bits of float32: exponents
are read and written as bits; adding 2**23 rounds to whole numbers, ties to even, and leaves them in the low bits.
"""

from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BLOCK = 32
"""Values that share one scale."""

LARGEST_SCALE = 252
"""With a larger one the largest code is beyond float32; 255 is the format's NaN."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_MANTISSA_BITS = 23
_BELOW_HALF = 2 ** (_MANTISSA_BITS - 1) - 1
"""Added to a float32's bits, it makes the exponent one larger if the mantissa is above 1.5: 6 is 1.5 * 4."""
_WHOLE = 2.0**_MANTISSA_BITS
"""From here on float32 has whole numbers only."""
_WHOLE_BITS = 0x4B00_0000
"""The bits of ``_WHOLE``; those of ``_WHOLE + n`` are larger by n."""
_PIECE = 2**14
"""Blocks unpacked at once: what a core's second-level cache takes. Accelerators take more."""
_PIECE_TO_PACK = 2**12
"""Blocks packed at once; packing needs more temporary memory than unpacking."""
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
    values = weight.reshape(-1, BLOCK)
    blocks = torch.empty(len(values), BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(values), dtype=torch.uint8, device=weight.device)
    size = _PIECE_TO_PACK if weight.device.type == "cpu" else _PIECE_ELSEWHERE
    for piece, packed, scale in zip(*(part.split(size) for part in (values, blocks, scales)), strict=True):
        _pack(piece.float(), packed, scale)
    shape = *weight.shape[:-1], weight.shape[-1] // BLOCK
    return blocks.view(*shape, BLOCK // 2), scales.view(shape)


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


def _pack(
    values: Float[Tensor, "block 32"], blocks: UInt8[Tensor, "block 16"], scales: UInt8[Tensor, " block"]
) -> None:
    """Write the codes and scales of float32 values into ``blocks`` and ``scales``."""
    magnitude = values.abs()
    largest = magnitude.amax(-1)
    if not torch.isfinite(largest).all():
        raise ValueError("MXFP4 cannot store infinite or NaN weights")
    exponent = ((largest.view(torch.int32) + _BELOW_HALF) >> _MANTISSA_BITS).sub_(2).clamp_(min=1)
    scales.copy_(exponent)
    inverse = ((2 * _BIAS - exponent) << _MANTISSA_BITS).view(torch.float32)
    codes = _round_to_code(magnitude.mul_(inverse.unsqueeze(1)))
    codes.sub_(values.view(torch.int32) >> 31, alpha=8)  # 8 more where the sign, shifted in, makes -1
    pairs = codes.view(torch.int64)  # the later value in the high half, whose low byte is 28 bits above its nibble
    blocks.copy_(pairs + (pairs >> 28)).sub_(_WHOLE_BITS >> 28)


def _round_to_code(magnitude: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The nearest code of magnitudes up to 6, on a tie the even one, added to ``_WHOLE_BITS``.

    Codes are 2 m up to 2, m + 2 up to 4 and m / 2 + 4 above: the least of the three, each rounded once, when added.
    """
    whole = torch.tensor(_WHOLE, device=magnitude.device)
    least = torch.add(whole, magnitude, alpha=2)
    torch.minimum(least, magnitude + (_WHOLE + 2), out=least)
    torch.minimum(least, torch.add(whole + 4, magnitude, alpha=0.5), out=least)
    return least.view(torch.int32)


@cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> Int[Tensor, "256"]:
    """For every byte the two values it holds, low nibble first, as the integer of their bits."""
    signed = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((signed[byte & 15], signed[byte >> 4]), dim=-1)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


@cache
def _power_table(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256"]:
    """What every scale multiplies by."""
    exponent = torch.arange(256, device=device) - _BIAS
    return torch.ldexp(torch.ones(256, device=device), exponent).to(dtype)

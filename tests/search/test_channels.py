"""The order of channels, against what leaving each of them out really does."""

import pytest
import torch

from moesaic.models import layers, loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.rank_experts.channels import order_channels, shuffle_channels

ENERGIES = torch.tensor([[4.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
NORMS = torch.tensor([[1.0, 9.0, 3.0], [1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("criterion", "first", "unused"),
    [
        ("output_energy", [1, 2, 0], [0, 1, 2]),  # 4, 9, 6
        ("activation", [0, 2, 1], [0, 1, 2]),
        ("weight", [1, 2, 0], [2, 1, 0]),
    ],
)
def test_orders_by_hand(criterion: str, first: list[int], unused: list[int]) -> None:
    """The second expert was given no token: its channels are alike but by weight, and ties go to the lower id."""
    assert order_channels(criterion, ENERGIES, NORMS, 0).tolist() == [first, unused]


def test_random_depends_on_the_seed_alone() -> None:
    orders = [order_channels("random", torch.rand(2, 50), torch.rand(2, 50), seed) for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0], shuffle_channels(2, 50, 1)) and not torch.equal(orders[0][0], orders[0][1])
    assert orders[0].sort(-1).values.tolist() == [list(range(50))] * 2


@torch.no_grad()
def test_output_energy_is_the_error_of_leaving_one_channel_out(tiny_checkpoint: Checkpoint) -> None:
    """Every channel of two experts is masked by itself; spare experts, which are not mixed, do not count."""
    block = loading.load_block(tiny_checkpoint, 3).double()
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normed = block.post_attention_layernorm(states)
    energies = layers.route(block, normed, num_spare=2).energies
    scores = energies * layers.down_norms(block.mlp.experts)
    whole, down = layers.mix(block, states), block.mlp.experts.down_proj.data.clone()
    for expert in (2, 5):
        for channel in range(64):
            block.mlp.experts.down_proj.data = down.clone()
            block.mlp.experts.down_proj.data[expert, channel] = 0
            error = (layers.mix(block, states) - whole).square().sum()
            assert float(scores[expert, channel]) == pytest.approx(float(error), rel=1e-5, abs=1e-12)
    assert float(scores[[2, 5]].min()) >= 0 and float(scores[[2, 5]].max()) > 1e-3

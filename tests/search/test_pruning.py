"""Pruning slices what counts experts and leaves every other byte alone."""

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.models import mxfp4
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.prune_model.pruning import kept_channels, kept_experts, narrow_experts, prune_layer


def test_kept_experts_are_the_best_in_ascending_order() -> None:
    assert kept_experts([5, 0, 3, 1, 4, 2], 3) == (0, 3, 5)
    assert kept_experts([5, 0, 3, 1, 4, 2], 6) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("count", [0, 7])
def test_a_count_that_the_ranking_cannot_give_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="keep 1 to 6"):
        kept_experts([5, 0, 3, 1, 4, 2], count)


def test_kept_experts_are_byte_exact_and_the_rest_of_the_layer_is_untouched(tiny_checkpoint: Checkpoint) -> None:
    tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(1)}
    pruned = prune_layer(tensors, (1, 6, 7))
    for name, tensor in tensors.items():
        expected = tensor[[1, 6, 7]] if ".experts." in name or ".router." in name else tensor
        assert torch.equal(pruned[name], expected)


def test_kept_channels_are_each_experts_best_in_ascending_order() -> None:
    orders = torch.tensor([[3, 0, 2, 1], [0, 1, 3, 2]])
    assert kept_channels(orders, 3).tolist() == [[0, 2, 3], [0, 1, 3]]
    with pytest.raises(ConfigError, match="cannot keep 5 of 4 ranked channels; keep 1 to 4"):
        kept_channels(orders, 5)


@pytest.fixture
def channels() -> torch.Tensor:
    """Half of the channels of each of eight experts."""
    draws = [torch.randperm(64, generator=torch.Generator().manual_seed(expert))[:32] for expert in range(8)]
    return torch.stack(draws).sort(-1).values


def test_a_narrower_expert_has_the_bytes_of_its_gate_and_up_rows(
    tiny_checkpoint: Checkpoint, channels: torch.Tensor
) -> None:
    """Row by row: gate and up of channel c are rows 2c and 2c + 1."""
    tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(1)}
    narrowed, _ = narrow_experts(tensors, channels)
    for part in ("blocks", "scales", "bias"):
        name = f"model.layers.1.mlp.experts.gate_up_proj_{part}"
        for expert, kept in enumerate(channels.tolist()):
            for place, channel in enumerate(kept):
                pair = tensors[name][expert, 2 * channel : 2 * channel + 2]
                assert torch.equal(narrowed[name][expert, 2 * place : 2 * place + 2], pair)
    untouched = [name for name in tensors if ".experts." not in name or name.endswith("down_proj_bias")]
    assert all(narrowed[name] is tensors[name] for name in untouched)


def test_columns_packed_anew_are_near_and_lose_what_is_said(
    tiny_checkpoint: Checkpoint, channels: torch.Tensor
) -> None:
    tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(1)}
    narrowed, lost = narrow_experts(tensors, channels)
    name = "model.layers.1.mlp.experts.down_proj"
    before, after = (mxfp4.dequantize(own[f"{name}_blocks"], own[f"{name}_scales"]) for own in (tensors, narrowed))
    kept = torch.stack([weight[:, own] for weight, own in zip(before, channels, strict=True)])
    assert after.shape == (8, 64, 32)
    assert lost == pytest.approx(float((after - kept).double().square().sum() / kept.double().square().sum()))
    assert 0 < lost < 0.01
    assert bool((after == kept).double().mean() > 0.7), "most keep their scale"


def test_a_whole_group_of_channels_loses_nothing(tiny_checkpoint: Checkpoint) -> None:
    tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(1)}
    narrowed, lost = narrow_experts(tensors, torch.arange(32, 64).expand(8, -1))
    name = "model.layers.1.mlp.experts.down_proj"
    before, after = (mxfp4.dequantize(own[f"{name}_blocks"], own[f"{name}_scales"]) for own in (tensors, narrowed))
    assert lost == 0 and torch.equal(after, before[:, :, 32:])


def test_unpacked_experts_are_sliced(channels: torch.Tensor) -> None:
    """As transformers lays them out: inputs, then outputs."""
    draw = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(8, 5, 128, generator=draw), torch.randn(8, 64, 5, generator=draw)
    names = [f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    narrowed, lost = narrow_experts(dict(zip(names, (gate_up, down), strict=True)), channels)
    for expert, kept in enumerate(channels):
        assert torch.equal(narrowed[names[0]][expert][:, ::2], gate_up[expert][:, 2 * kept])
        assert torch.equal(narrowed[names[0]][expert][:, 1::2], gate_up[expert][:, 2 * kept + 1])
        assert torch.equal(narrowed[names[1]][expert], down[expert][kept])
    assert lost == 0

"""Pruning slices what counts experts and leaves every other byte alone."""

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.prune_model.pruning import kept_experts, prune_layer


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

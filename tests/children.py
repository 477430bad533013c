"""Children that keep the first experts and channels of their parent."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.models.architecture import Block
from moesaic.search.prune_model.pruning import narrow_experts, prune_layer


def first_of(tensors: Mapping[str, Tensor], block: Block) -> dict[str, Tensor]:
    """A layer's tensors as stored, with as many experts and channels as a block has."""
    pruned = prune_layer(tensors, range(block.num_experts))
    (bias,) = (tensor for name, tensor in pruned.items() if name.endswith("gate_up_proj_bias"))
    if bias.shape[1] == 2 * block.expert_width:
        return pruned
    return narrow_experts(pruned, torch.arange(block.expert_width).expand(block.num_experts, -1))[0]

"""The weighted mean of policies (paper A, reinforcement learning: the final model is the average of both policies).

    mean = sum_p (w_p / sum_q w_q) x_p

over policies p with weights w, tensor by tensor. Products are summed in float32 whatever the dtype, and the sum is
rounded once to the dtype the tensors are stored in.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def weighted_mean(tensors: Sequence[Float[Tensor, "*axes"]], weights: Sequence[float]) -> Float[Tensor, "*axes"]:
    """The mean of tensors of one shape and dtype; weights are divided by their sum."""
    total = sum(weights)
    mean = torch.zeros(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)
    for tensor, weight in zip(tensors, weights, strict=True):
        mean += tensor.float() * (weight / total)
    return mean.to(tensors[0].dtype)


def same_bytes(first: Shaped[Tensor, "*axes"], second: Shaped[Tensor, "*axes"]) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes; unlike ``==`` this tells 0 from -0."""
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))

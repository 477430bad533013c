"""The file in which ``rank_experts`` leaves the order of every expert's channels."""

from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.models.architecture import Architecture

CHANNELS = "channels.safetensors"
"""The file beside ``ranking.json`` with every layer's channel orders, under the layer's number."""


def read_channels(directory: Path, parent: Architecture) -> list[Int[Tensor, "expert channel"]]:
    """Of every layer the channels of each expert, most important first, beside a ``ranking.json``.

    Raises:
        ArtifactError: if they are missing, or not all the parent's channels.
    """
    path = directory / CHANNELS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as broken:
        raise ArtifactError(
            f"{path} cannot be read ({broken}); narrower experts need it: give the output of rank_experts"
        ) from broken
    layers = [stored.get(str(layer)) for layer in range(parent.num_layers)]
    orders = [order.long() for order in layers if order is not None]
    shapes = [tuple(order.shape) for order in orders]
    if shapes != [(block.num_experts, block.expert_width) for block in parent.blocks] or any(
        not bool((order.sort(-1).values == torch.arange(order.shape[1])).all()) for order in orders
    ):
        raise ArtifactError(f"{path} is not of the parent given; run rank_experts on this parent")
    return orders

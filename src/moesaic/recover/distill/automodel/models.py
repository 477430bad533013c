"""Child and parent as transformers' own classes, for training on CPUs; what AutoModel calls to build its models."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.whole_model import load_model


def load_child(pretrained_model_name_or_path: str, trainable: list[str], **_: Any) -> PreTrainedModel:
    """The child in float32, which its weights and their optimiser stay in; only ``trainable`` groups have gradients."""
    directory = Path(pretrained_model_name_or_path)
    model = load_model(directory, torch.float32)
    checkpoint = Checkpoint.open(directory)
    names = set(layout.trainable_names(checkpoint.shape, checkpoint.architecture, trainable))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def load_parent(pretrained_model_name_or_path: str, precision: str, **_: Any) -> PreTrainedModel:
    """The parent, in what it computes in; it has no gradients."""
    model = load_model(Path(pretrained_model_name_or_path), getattr(torch, precision))
    return model.requires_grad_(False)

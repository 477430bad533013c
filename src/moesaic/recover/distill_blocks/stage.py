"""Optional block-wise local distillation on nemo_toolkit.

`steps: 0` (the default) hands the child on unchanged.
"""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Config, Positive, Precision
from moesaic.core.stage import Stage, dataset, model
from moesaic.recover.training import OptimizerConfig, Trainable


class DistillBlocksConfig(Config):
    """Block-wise local distillation (paper B): each changed block alone learns its parent block's output."""

    trainable: tuple[Trainable, ...] = ("attention", "norms", "router")
    """What learns inside a block; experts never do."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of each block. 0 hands the child on as it is."""
    max_sequences: Positive = 128
    """Calibration sequences to learn from."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 8192
    """Tokens of one step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights move."""
    checkpoint_every_steps: Positive = 100
    """A killed run resumes from the last of these."""
    layers_in_parallel: Positive = 1
    """Blocks trained at the same time, each in a process of its own."""
    seed: int = 0
    """For the order of the data."""
    precision: Precision = "float32"
    """What blocks compute in."""


STAGE = Stage(
    name="distill_blocks",
    config=DistillBlocksConfig,
    runtime="train",
    inputs=(
        model("child", "pruned checkpoint"),
        model("parent", "what it was pruned from"),
        dataset("calibration", "conversations to learn from"),
    ),
    outputs=(model("trained", "manifest of the child's checkpoint"),),
    makes_weights=True,
    trains=True,
)

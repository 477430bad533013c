"""Replaces one block at a time by every variant and measures the damage at the model's output, in short and in long
contexts.
"""

from typing import Annotated, Literal

from pydantic import Field

from moesaic.core.config import Balance, Config, Positive, Precision
from moesaic.core.stage import Stage, artifact, dataset, model
from moesaic.search.space import SearchSpace

DamageMetric = Literal["hidden_mse", "kl", "lm_loss", "cosine", "top1"]


class ScoreBlocksConfig(Config):
    """Replace-one-block damage of every variant."""

    space: SearchSpace
    """The variants to score."""
    metric: DamageMetric = "hidden_mse"
    """The metric that becomes the damage; all of them are recorded."""
    long_weight: Annotated[float, Field(ge=0)] = 1.0
    """Damage = short score + long_weight * long score, each normalised as ``scoring.py`` says."""
    balance: Balance = "trace"
    """Whether every measured token counts alike, or every sequence: then short replies, as at low effort, weigh as
    much as long ones."""
    max_sequences: Positive = 128
    """Sequences to use of each calibration set, from its start."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    max_long_tokens: Positive | None = None
    """Longer sequences of the long set are cut here; None: as short ones are."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through a layer at once."""
    variants_per_batch: Positive = 4
    """Variants whose hidden states go through the later layers together."""
    precision: Precision = "float32"
    """What layers compute in; damage is summed in float64."""


STAGE = Stage(
    name="score_blocks",
    config=ScoreBlocksConfig,
    runtime="search",
    inputs=(
        model("parent", "checkpoint to compress"),
        artifact("ranking", "which experts a smaller block keeps"),
        dataset("calibration_short", "short conversations"),
        dataset("calibration_long", "long conversations; only tokens behind the window count"),
    ),
    outputs=(artifact("scores", "`scores.json`: a row per layer and variant, with every metric"),),
)

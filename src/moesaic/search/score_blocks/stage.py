"""Replaces one block at a time by every variant and measures the damage at the model's output, in short and in long
contexts.
"""

from moesaic.core.config import Positive
from moesaic.core.stage import Stage, artifact, dataset, model
from moesaic.search.damage_config import DamageConfig
from moesaic.search.space import SearchSpace


class ScoreBlocksConfig(DamageConfig):
    """Replace-one-block damage of every variant."""

    space: SearchSpace
    """The variants to score."""
    variants_per_batch: Positive = 4
    """Variants whose hidden states go through the later layers together."""


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

"""The weighted mean of policies that come from one checkpoint; experts must be the same bytes in all."""

from moesaic.core.config import Amount, Config
from moesaic.core.stage import Stage, model


class AverageCheckpointsConfig(Config):
    """The weighted mean of policies (paper A: of two)."""

    weights: tuple[Amount, ...] | None = None
    """One per policy; they are divided by their sum. None: all equal."""


STAGE = Stage(
    name="average_checkpoints",
    config=AverageCheckpointsConfig,
    runtime="search",
    inputs=(model("policies", "checkpoints of one architecture", many=True),),
    outputs=(model("averaged", "manifest of their mean"),),
    makes_weights=True,
)

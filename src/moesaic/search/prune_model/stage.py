"""Assembles a candidate's checkpoint from the parent's weights; kept experts are byte-exact.

The weights go to the store.
"""

from moesaic.core.config import Config
from moesaic.core.stage import Stage, artifact, model


class PruneModelConfig(Config):
    """Which of the search's candidates becomes a checkpoint."""

    candidate: str = "puzzle"
    """``puzzle`` is the search's best; baselines have their names, see ``moesaic.search``."""


STAGE = Stage(
    name="prune_model",
    config=PruneModelConfig,
    runtime="search",
    inputs=(
        model("parent", "checkpoint to cut from"),
        artifact("ranking", "which experts to keep"),
        artifact("architecture", "holds the candidate"),
    ),
    outputs=(model("child", "manifest of the child's checkpoint"),),
    makes_weights=True,
    model_field="candidate",
)

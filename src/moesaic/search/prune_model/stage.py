"""Assembles a candidate's checkpoint from the parent's weights; kept experts are byte-exact, but for the second
projection of narrower ones, which is packed anew.

The weights go to the store.
"""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Config
from moesaic.core.stage import Stage, artifact, model


class PruneModelConfig(Config):
    """Which of the search's candidates becomes a checkpoint."""

    candidate: str = "puzzle"
    """``puzzle`` is the search's best; baselines have their names, see ``search_architecture/baselines.py``."""
    yarn_factor: Annotated[float, Field(ge=1)] | None = None
    """How far YaRN stretches the child's positions (paper A's child: 56, of a parent with 32). None: as in the parent.

    It stands in the child's config, so distillation, evaluation and engines all go by it. Scores are of the parent, and
    so are baselines that are only pruned and evaluated.
    """


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

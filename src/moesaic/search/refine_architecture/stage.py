"""Runs the best assemblies whole, learns how the damages of their blocks interact, and solves again, until its
evaluations are spent. The measured assembly of least damage becomes the candidate `puzzle`; the search's own stays as
`unrefined`. Returns the `prune_model` configs of the baselines.
"""

from typing import Self

from moesaic.core.config import Positive
from moesaic.core.stage import Stage, artifact, dataset, model
from moesaic.search.damage_config import DamageConfig
from moesaic.search.score_blocks.stage import ScoreBlocksConfig


class RefineArchitectureConfig(DamageConfig):
    """Assemblies to measure; metric, balance and weight of long contexts must be those of the scores."""

    evaluations: Positive = 16
    """Assemblies that are run whole; with 1 the search's choice is measured and kept."""
    assemblies_per_round: Positive = 4
    """Assemblies that go through a layer together; what they teach is used from the next round on."""

    @classmethod
    def like(cls, scores: ScoreBlocksConfig, evaluations: int = 16) -> Self:
        """Measure as the scores were."""
        shared = {name: getattr(scores, name) for name in DamageConfig.model_fields}
        return cls(**shared, evaluations=evaluations)


STAGE = Stage(
    name="refine_architecture",
    config=RefineArchitectureConfig,
    runtime="search",
    returns="baselines_of",
    inputs=(
        model("parent", "what damage is measured against"),
        artifact("ranking", "which experts a smaller block keeps"),
        artifact("scores", "damage of single blocks"),
        artifact("costs", "memory and runtime"),
        artifact("architecture", "the search's choice, and its limits"),
        dataset("calibration_short", "short conversations"),
        dataset("calibration_long", "long conversations; only tokens behind the window count"),
    ),
    outputs=(
        artifact("refined", "`architecture.json` with the measured choice as `puzzle`, and every assembly measured"),
    ),
)

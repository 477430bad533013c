"""Orders the experts of every layer, and the channels of every expert, by importance, in one streaming pass over
calibration data.
"""

from typing import Literal

from moesaic.core.config import Config, Positive, Precision
from moesaic.core.stage import Stage, artifact, dataset, model

Criterion = Literal["removal_difference", "ranked_choice", "reap", "frequency", "random"]
ChannelCriterion = Literal["output_energy", "activation", "weight", "random"]
NUM_SPARE: dict[Criterion, int] = {"removal_difference": 1}
"""Expert outputs beyond the top k that a criterion needs; 0 where not listed."""


class RankExpertsConfig(Config):
    """The order in which a layer's experts matter, and an expert's channels."""

    criterion: Criterion = "removal_difference"
    """The importance formula of experts, see ``ranking.py``; experts are ordered by ``reap`` as well."""
    channel_criterion: ChannelCriterion = "output_energy"
    """The importance formula of channels, see ``channels.py``; narrower experts keep the best."""
    max_sequences: Positive = 128
    """Calibration sequences to use, from the start of the set."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through a layer at once."""
    precision: Precision = "float32"
    """What layers compute in; sums are always float64."""
    seed: int = 0
    """For the random criteria."""


STAGE = Stage(
    name="rank_experts",
    config=RankExpertsConfig,
    runtime="search",
    inputs=(
        model("parent", "checkpoint to compress"),
        dataset("calibration_short", "calibration conversations"),
    ),
    outputs=(
        artifact(
            "ranking",
            "`ranking.json`: per layer the order, the scores, REAP's order; `channels.safetensors`: every expert's",
        ),
    ),
)

"""How damage is measured: the part of their configs that scoring and refinement share."""

from typing import Annotated, Literal

from pydantic import Field

from moesaic.core.config import Balance, Config, Positive, Precision

DamageMetric = Literal["hidden_mse", "kl", "lm_loss", "cosine", "top1"]


class DamageConfig(Config):
    """The tokens that damage is measured on, and what is measured."""

    metric: DamageMetric = "hidden_mse"
    """The metric that becomes the damage; all of them are recorded."""
    long_weight: Annotated[float, Field(ge=0)] = 1.0
    """Damage = short score + long_weight * long score, each normalised as ``score_blocks/damage.py`` says."""
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
    precision: Precision = "float32"
    """What layers compute in; damage is summed in float64."""

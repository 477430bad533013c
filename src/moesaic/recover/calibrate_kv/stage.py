"""Max-calibrated scales of K (after RoPE) and V per layer by NVIDIA ModelOpt, as one small shard beside untouched
weights.
"""

from typing import Self

from pydantic import model_validator

from moesaic.core.config import Config, Positive, Precision
from moesaic.core.stage import Stage, dataset, model


class CalibrateKvConfig(Config):
    """FP8 scales of what the KV cache stores: K after RoPE, and V, per layer."""

    max_sequences: Positive = 128
    """Calibration sequences to use, from the start of the set."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through the model at once."""
    power_of_two: bool = False
    """Round scales up to powers of two, which fold into weights without rounding."""
    fold: bool = False
    """Fold the scales into the projections, for engines that ignore scale tensors; needs ``power_of_two``."""
    precision: Precision = "bfloat16"
    """What the model computes in."""

    @model_validator(mode="after")
    def _foldable(self) -> Self:
        if self.fold and not self.power_of_two:
            raise ValueError("fold needs power_of_two: other scales would round the folded weights")
        return self


STAGE = Stage(
    name="calibrate_kv",
    config=CalibrateKvConfig,
    runtime="kv",
    inputs=(
        model("model", "checkpoint to calibrate"),
        dataset("calibration", "conversations whose keys and values set the scales"),
    ),
    outputs=(model("calibrated", "manifest of the checkpoint with scales"),),
    makes_weights=True,
)

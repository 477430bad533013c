"""Optional fit of a pruned child's routers to the experts that are left, without training.

`tokens: 0` (the default) hands the child on unchanged.
"""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Config, Positive, Precision
from moesaic.core.stage import Stage, dataset, model


class FitRoutersConfig(Config):
    """Per expert a scale, and a bias where routers have one, by least squares to the parent's states."""

    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that each layer is fitted on, at most; enough are 4096. A ninth of that is held out. 0 hands the child on
    as it is."""
    max_sequences: Positive = 128
    """Calibration sequences that the tokens are taken from, evenly."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through a layer at once."""
    ridge: Annotated[float, Field(ge=0)] = 1e-4
    """What the squares of biases, and of scales less 1, cost."""
    precision: Precision = "float32"
    """What layers compute in; the fit itself is in float64."""


STAGE = Stage(
    name="fit_routers",
    config=FitRoutersConfig,
    runtime="search",
    inputs=(
        model("child", "pruned checkpoint"),
        model("parent", "what it was pruned from"),
        dataset("calibration", "conversations to fit on"),
    ),
    outputs=(model("fitted", "manifest of the child's checkpoint"),),
    makes_weights=True,
)

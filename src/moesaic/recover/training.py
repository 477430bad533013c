"""What the training stages have in common in their configs: which weights learn, and the optimiser."""

from typing import Annotated, Literal

from pydantic import Field

from moesaic.core.config import Amount, Config

Trainable = Literal["attention", "norms", "router", "feed_forward", "embedding", "head"]
"""Groups of weights; ``feed_forward`` are dense layers and shared experts, in families that have them."""


class OptimizerConfig(Config):
    """AdamW with a linear warm-up and a cosine decay."""

    learning_rate: Amount = 1e-4
    """At the end of the warm-up."""
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step, as a share of the highest."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises from nothing."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the gradient's first and second moments."""
    max_gradient_norm: Amount = 1.0
    """Gradients are scaled down to this norm."""

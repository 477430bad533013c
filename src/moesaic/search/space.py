"""The search space: the variants that every block may be replaced by.

Sources: paper A for experts and windows, arXiv 2607.04371 for experts per token and expert width.
"""

from collections.abc import Collection, Mapping
from typing import Self

from pydantic import model_validator

from moesaic.core.config import Config, Positive, Window
from moesaic.models.architecture import Block


class SearchSpace(Config):
    """The variants each block may be replaced by."""

    expert_counts: tuple[Positive, ...]
    """Expert counts on offer, to the layers that have more; a layer's own always is."""
    experts_per_token: tuple[Positive, ...] = ()
    """Experts per token on offer, to the layers that use more; a layer's own always are."""
    expert_widths: tuple[Positive, ...] = ()
    """Channels per expert on offer, to the layers whose experts have more; in MXFP4 multiples of 32, and on GPUs better
    of 128, to which their kernels pad."""
    windows: tuple[Window, ...] = ()
    """Windows on offer, in tokens, to the layers that are full in the parent; staying full always is."""
    expert_parallel_size: Positive = 1
    """Every expert count must be divisible by this."""

    def offers(self, block: Block) -> Mapping[str, Collection[int]]:
        """What is on offer to a parent's block on every axis, by the axis's name, beside its own value."""
        return {
            "num_experts": self.expert_counts,
            "experts_per_token": self.experts_per_token,
            "expert_width": self.expert_widths,
            "window": self.windows if block.window is None else (),
        }

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for count in self.expert_counts:
            if count % self.expert_parallel_size:
                raise ValueError(
                    f"expert count {count} is not divisible by expert_parallel_size {self.expert_parallel_size}"
                )
        return self

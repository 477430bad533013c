"""The search space: the variants that every block may be replaced by (paper A, expert pruning and window attention)."""

from typing import Self

from pydantic import model_validator

from moesaic.core.config import Config, Positive, Window


class SearchSpace(Config):
    """The variants each block may be replaced by (paper A: expert counts and window attention)."""

    expert_counts: tuple[Positive, ...]
    """Expert counts on offer, to the layers that have more; a layer's own always is."""
    windows: tuple[Window, ...] = ()
    """Windows on offer, in tokens, to the layers that are full in the parent; staying full always is."""
    expert_parallel_size: Positive = 1
    """Every expert count must be divisible by this."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for count in self.expert_counts:
            if count % self.expert_parallel_size:
                raise ValueError(
                    f"expert count {count} is not divisible by expert_parallel_size {self.expert_parallel_size}"
                )
        return self

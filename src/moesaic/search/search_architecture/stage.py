"""Solves for one block per layer with the least damage under all limits at once; sweeps the frontier and makes
baselines of equal budget.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field

from moesaic.core.config import Amount, Config, Positive
from moesaic.core.stage import Stage, artifact, model

Baseline = Literal[
    "uniform", "uniform_reap", "uniform_width", "uniform_memory", "uniform_throughput", "greedy", "max_parameters"
]


class Limits(Config):
    """Upper or lower bounds on one assembly. Each is absolute, or relative to the parent where its name says so."""

    memory_mib: Amount | None = None
    """Weights plus KV cache of the workload's concurrent requests, at most."""
    memory_ratio: Amount | None = None
    """Memory as a share of the parent's, at most."""
    throughput_tokens_per_s: Amount | None = None
    """Output tokens per second, at least."""
    throughput_ratio: Amount | None = None
    """Throughput as a multiple of the parent's, at least."""
    latency_ms: Amount | None = None
    """Time of one decode step, at most."""
    latency_ratio: Amount | None = None
    """Time of one decode step as a share of the parent's, at most."""


class SearchArchitectureConfig(Config):
    """The MIP: least damage under every workload's limits at once."""

    limits: dict[str, Limits] = {}
    """Per workload name."""
    max_parameters: Positive | None = None
    """Parameters of the child, at most."""
    max_parameters_ratio: Amount | None = None
    """Parameters of the child as a share of the parent's, at most."""
    max_experts_ratio: Amount | None = None
    """Experts of the child, at most, as a share of the parent's."""
    max_layouts: Positive | None = None
    """Different attention windows (full counts as one), at most."""
    min_windowed_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the parent's full layers that must become windows, at least."""
    num_solutions: Positive = 3
    """Diverse solutions to return, best first."""
    diversity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of blocks that a further solution may have in common with each earlier one, at most."""
    frontier_points: Positive = 12
    """Points of the damage-against-speed frontier."""
    baselines: tuple[Baseline, ...] = get_args(Baseline)
    """What the search is compared with, see ``baselines.py``; each is pruned and evaluated."""
    random_seeds: tuple[int, ...] = (0, 1, 2)
    """One random baseline per seed."""
    time_limit_s: Amount = 60.0
    """For each solve; status, bound and gap are always reported."""
    relative_gap: Annotated[float, Field(ge=0)] = 1e-6
    """Stop when proven within this of the optimum."""

    @property
    def rivals(self) -> tuple[str, ...]:
        """The names of all baselines, the random ones included."""
        return *self.baselines, *(f"random-{seed}" for seed in self.random_seeds)


STAGE = Stage(
    name="search_architecture",
    config=SearchArchitectureConfig,
    runtime="search",
    inputs=(
        model("parent", "limits may be relative to it"),
        artifact("scores", "damage"),
        artifact("costs", "memory and runtime"),
    ),
    outputs=(artifact("architecture", "`architecture.json`: candidates, frontier, limits"),),
)

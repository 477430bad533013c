"""The plan of a pipeline run: bytes, memory, GPU-hours, and traffic to the store, computed before it starts.

Nothing is read but headers. Sizes follow from shapes (``moesaic.models.layout``), times from the hardware table;
the formulas of a stage stand in its room, in ``needs.py``. Where a number depends on data that is not there, it is an
upper bound or one of the ``Assumed`` values.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moesaic.core.config import Config
from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, model_of
from moesaic.models.architecture import Architecture
from moesaic.models.families import PUBLISHED
from moesaic.models.peak import Peak
from moesaic.search.search_architecture.stage import SearchArchitectureConfig
from moesaic.stages import find_stage

HOUR_MS = 3.6e6
MEMORY = ("device_bytes", "host_bytes", "state_bytes")
"""What a task holds at once, see :class:`~moesaic.costs.facts.Needs`."""


@dataclass(frozen=True)
class Planned:
    """A task with its needs and its traffic, after all tasks before it."""

    task: PipelineTask[Config]
    inputs: tuple[ShardSizes, ...]
    """The shards of the models that it takes."""
    needs: Needs
    simulated: bool
    """Whether what it holds on a device was simulated, not computed by a formula."""
    upload_bytes: int
    """Bytes of shards that the store does not have yet."""
    download_bytes: int
    """Bytes of the shards of its models, for an empty cache."""

    def as_json(self) -> dict[str, Any]:
        """One entry of the plan."""
        hours = self.needs.gpu_ms
        return {
            "task": self.task.name,
            "stage": self.task.stage,
            "read_bytes": round(self.needs.read_bytes),
            "written_bytes": round(self.needs.written_bytes),
            "device_bytes": round(self.needs.device_bytes),
            "device": {what: round(size) for what, size in self.needs.device.items()},
            "simulated": self.simulated,
            "host_bytes": round(self.needs.host_bytes),
            "state_bytes": round(self.needs.state_bytes),
            "gpu_hours": None if hours is None else round(hours / HOUR_MS, 4),
            "upload_bytes": self.upload_bytes,
            "download_bytes": self.download_bytes,
            "counts": dict(self.needs.counts),
        }


def assume_child(parent: Architecture, config: SearchArchitectureConfig) -> Architecture:
    """A child to plan with: the released one if there is one, else a uniform one at the recipe's limits.

    The uniform one keeps ``max_experts_ratio`` of each layer's experts (three quarters if there is no such limit) and
    every window as it is, so its cache is the parent's: an upper bound.
    """
    if released := released_child(parent):
        return released[1]
    ratio = min(config.max_experts_ratio or 0.75, 1.0)
    return Architecture.of(replace(block, num_experts=math.floor(block.num_experts * ratio)) for block in parent.blocks)


def released_child(parent: Architecture) -> tuple[str, Architecture] | None:
    """The child that is published of this parent: its name and blocks."""
    return next((one.child for one in PUBLISHED.values() if one.architecture == parent), None)


def plan(tasks: Iterable[PipelineTask[Config]], facts: Facts, *, simulate: bool = False) -> list[Planned]:
    """Go through the tasks in an order in which each follows those it takes models from.

    Args:
        tasks: of the pipeline.
        facts: what is planned for.
        simulate: run what can be run on tensors without values, for its true memory on a device; it takes minutes.
    """
    made: dict[str, ShardSizes] = {}
    stored: dict[str, int] = {}
    planned = []
    for task in tasks:
        inputs = tuple(made[name] for name in task.models)
        needs = needs_of(task, facts, inputs)
        peak = _simulated(task, facts, inputs[0]) if simulate and inputs else None
        if peak is not None:
            needs = replace(needs, device=peak.parts)
        made[task.name] = needs.made
        new = {key: size for key, size in needs.made.items() if key not in stored}
        stored |= new
        downloads = {key: size for shards in inputs for key, size in shards.items()}
        planned.append(Planned(task, inputs, needs, peak is not None, sum(new.values()), sum(downloads.values())))
    return planned


def needs_of(task: PipelineTask[Config], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """What a task needs by the formulas of its stage."""
    formulas = find_stage(task.stage).planned_by("needs")
    needs: Needs = formulas(task, facts, inputs) if formulas else Needs()
    return needs


def _simulated(task: PipelineTask[Config], facts: Facts, model: ShardSizes) -> Peak | None:
    """What the task holds on a device at its peak, by its stage's own simulation; None if it has none.

    Generation by an engine, reinforcement and the benchmarks have none: a plan has their memory by formulas, the
    engines' own where there are some. The first simulation of a kind takes a minute.
    """
    run = find_stage(task.stage).planned_by("simulate")
    peak: Peak | None = run(task, facts, model_of(facts, model)) if run else None
    return peak


def totals(planned: Sequence[Planned]) -> dict[str, float | None]:
    """Sums over all tasks, and of memory the highest."""
    hours = [one.needs.gpu_ms for one in planned]
    modelled = [value for value in hours if value is not None]
    return {
        "read_bytes": round(sum(one.needs.read_bytes for one in planned)),
        "written_bytes": round(sum(one.needs.written_bytes for one in planned)),
        **{name: round(max(getattr(one.needs, name) for one in planned)) for name in MEMORY},
        "gpu_hours": round(sum(modelled) / HOUR_MS, 2) if len(modelled) == len(hours) else None,
        "upload_bytes": sum(one.upload_bytes for one in planned),
        "download_bytes": sum(one.download_bytes for one in planned),
    }

"""What ``search_architecture`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes
from moesaic.search.search_architecture.stage import SearchArchitectureConfig


def needs(task: PipelineTask[SearchArchitectureConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """A solver on one CPU; each solve stops at its time limit."""
    config = task.config
    solves = config.num_solutions + config.frontier_points + 3
    return Needs(counts={"solves": solves, "cpu_seconds_at_most": solves * config.time_limit_s})

"""What ``prune_model`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, pruned_shards
from moesaic.search.prune_model.stage import PruneModelConfig


def needs(task: PipelineTask[PruneModelConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """A copy from file to file: reads what it keeps, writes the child, holds none of it.

    Narrower experts, of which the assumed child has none, go through the host's memory, a layer at a time.
    """
    made = pruned_shards(facts, task.config.candidate)
    return Needs(sum(made.values()), sum(made.values()), made=made)

"""What ``ingest`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, whole_parent
from moesaic.platform.ingest.stage import IngestConfig


def needs(task: PipelineTask[IngestConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """The parent is read once to be put into the store, under its digest."""
    parent = whole_parent(facts)
    return Needs(read_bytes=sum(parent.values()), made=parent)

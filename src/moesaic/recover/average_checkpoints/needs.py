"""What ``average_checkpoints`` needs."""

from collections.abc import Sequence

from moesaic.costs.block_costs import outer_bytes
from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig


def needs(task: PipelineTask[AverageCheckpointsConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Reads what the policies do not share, writes its mean; memory of the shard outside the layers, twice."""
    shared = {key: size for key, size in inputs[0].items() if all(key in other for other in inputs)}
    own = {key: size for key, size in inputs[0].items() if key not in shared}
    means = {f"{key.split(' by ')[0]} by {task.name}": size for key, size in own.items()}
    read = len(inputs) * sum(own.values())
    return Needs(read, sum(means.values()), host_bytes=2 * outer_bytes(facts.shape), made=shared | means)

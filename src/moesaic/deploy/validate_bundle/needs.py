"""What ``validate_bundle`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, model_of, resident
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig


def needs(task: PipelineTask[ValidateBundleConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Memory: the reference holds the model whole, unpacked; the engine, beside it, as it is stored."""
    model = model_of(facts, inputs[0])
    reference = resident(facts, model, task.config.precision) if task.config.compare_replies else 0
    return Needs(read_bytes=2 * sum(inputs[0].values()), peak_bytes=reference)

"""What ``distill_blocks`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import (
    TRAINED_BYTES,
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    new_bytes,
    retrained,
    trainable_parameters,
    two_layers,
)
from moesaic.costs.times import learn_ms
from moesaic.models.peak import LAYERS
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig


def needs(task: PipelineTask[DistillBlocksConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Each changed block alone: steps * batch_tokens tokens; without steps the child is handed on as it is.

    Memory: a block of the child and one of the parent, unpacked, and the optimiser of what learns in it, for every
    layer in parallel. Time as :func:`~moesaic.costs.times.learn_ms`, over the share of layers that changed.
    """
    config = task.config
    changed = sum(mine != theirs for mine, theirs in zip(facts.child.blocks, facts.parent.blocks, strict=True))
    if not config.steps:
        return Needs(made=inputs[0])
    tokens = config.steps * config.batch_tokens
    trained = trainable_parameters(facts, config.trainable) / facts.child.num_layers * TRAINED_BYTES
    at_once = config.layers_in_parallel
    learning = learn_ms(facts, tokens, config.max_tokens, config.trainable, teacher=True)
    made = retrained(inputs[0], task.name, config.trainable)
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs),
        written_bytes=new_bytes(made, inputs[0]),
        device={LAYERS: at_once * two_layers(facts, config.precision), "gradients, optimizer": at_once * trained},
        gpu_ms=None if learning is None else learning * changed / facts.child.num_layers,
        counts={"tokens": tokens, "layers": changed},
        made=made,
        smaller=("layers_in_parallel",),
    )

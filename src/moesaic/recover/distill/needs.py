"""What ``distill`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import (
    TRACE_BYTES_PER_TOKEN,
    TRAINED_BYTES,
    WIDTH,
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    new_bytes,
    resident,
    retrained,
    trainable_parameters,
)
from moesaic.costs.times import learn_ms
from moesaic.recover.distill.stage import DistillConfig


def needs(task: PipelineTask[DistillConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Tokens = steps * rows_per_step * sequence_tokens. Time: :func:`~moesaic.costs.times.learn_ms` with a teacher.

    Memory of one of ``g`` processes, everything sharded over them, experts unpacked::

        (parent + child) parameters * precision / g + trainable * 16 / g
        + rows_per_forward * sequence * hidden * (layers + 1) * precision       inputs of layers, kept for the backward
        + 2 logits_chunk_tokens * vocab * 4                                     logits of both

    Only what learns has gradients and optimiser state. Reads the traces as well as both models.
    """
    config = task.config
    tokens = config.steps * config.rows_per_step * config.sequence_tokens
    shape, width, ranks = facts.shape, WIDTH[config.precision], facts.target.num_gpus if facts.target else 1
    trainable = trainable_parameters(facts, config.trainable)
    weights = sum(resident(facts, model, config.precision) for model in (facts.parent, facts.child))
    states = config.rows_per_forward * config.sequence_tokens * shape.hidden_size * (facts.child.num_layers + 1) * width
    logits = 2 * config.logits_chunk_tokens * shape.vocab_size * 4
    made = retrained(inputs[0], task.name, config.trainable) if config.steps else inputs[0]
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs) + tokens * TRACE_BYTES_PER_TOKEN,
        written_bytes=new_bytes(made, inputs[0]),
        peak_bytes=(weights + trainable * TRAINED_BYTES) / ranks + states + logits,
        gpu_ms=learn_ms(facts, tokens, config.sequence_tokens, config.trainable, teacher=True),
        counts={
            "tokens": tokens,
            "trainable_parameters": trainable,
            "optimizer_bytes": trainable * TRAINED_BYTES,
        },
        made=made,
    )

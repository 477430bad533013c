"""What ``reinforce`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import (
    TRAINED_BYTES,
    WIDTH,
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    new_bytes,
    reply_tokens,
    resident,
    retrained,
    trainable_parameters,
)
from moesaic.costs.times import generate_ms, learn_ms
from moesaic.recover.reinforce.stage import ReinforceConfig


def needs(task: PipelineTask[ReinforceConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Replies = steps * prompts_per_step * generations_per_prompt: generated, then learnt from in one pass.

    Memory of one process: the policy in the config's precision and ``trainable * 16``; NeMo-RL shards both over its
    GPUs. A reply of the longest length is kept for the backward, ``replies_per_forward`` of them at once.
    """
    config = task.config
    replies = config.steps * config.prompts_per_step * config.generations_per_prompt
    mean = reply_tokens(facts, config.max_new_tokens)
    length = facts.assumed.prompt_tokens + mean
    generating = generate_ms(facts, facts.child, replies, mean)
    learning = learn_ms(facts, replies * length, length, config.trainable, teacher=False)
    trainable = trainable_parameters(facts, config.trainable)
    ranks = facts.target.num_gpus if facts.target and config.engine == "nemo_rl" else 1
    weights = resident(facts, facts.child, config.precision) + trainable * TRAINED_BYTES
    longest = config.replies_per_forward * (facts.assumed.prompt_tokens + config.max_new_tokens)
    states = longest * facts.shape.hidden_size * (facts.child.num_layers + 1) * WIDTH[config.precision]
    made = retrained(inputs[0], task.name, config.trainable) if config.steps else inputs[0]
    return Needs(
        read_bytes=sum(inputs[0].values()),
        written_bytes=new_bytes(made, inputs[0]),
        device_bytes=weights / ranks + states,
        gpu_ms=None if generating is None or learning is None else generating + learning,
        counts={"replies": replies, "tokens": replies * mean, "trainable_parameters": trainable},
        made=made,
    )

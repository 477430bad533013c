"""What ``reinforce`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from moesaic.costs.facts import (
    TRAINED_BYTES,
    WIDTH,
    Facts,
    Needs,
    PipelineTask,
    Placement,
    ShardSizes,
    new_bytes,
    reply_tokens,
    resident,
    retrained,
    trainable_parameters,
)
from moesaic.costs.times import generate_ms, learn_ms
from moesaic.recover.reinforce import stage
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.recover.training import Trainable

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[ReinforceConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Replies = steps * prompts_per_step * generations_per_prompt: generated, then learnt from in one pass.

    Memory of one process: see :func:`policy_memory`.

    Raises:
        ConfigError: if NeMo-RL cannot train the family.
    """
    config = task.config
    if config.steps and config.engine == "nemo_rl":
        facts.shape.family.check_adapter("nemo_rl")
    replies = config.steps * config.prompts_per_step * config.generations_per_prompt
    mean = reply_tokens(facts, config.max_new_tokens)
    length = facts.assumed.prompt_tokens + mean
    generating = generate_ms(facts, facts.child, replies, mean)
    learning = learn_ms(facts, replies * length, length, config.trainable, teacher=False)
    trainable = trainable_parameters(facts, config.trainable)
    made = retrained(inputs[0], task.name, config.trainable) if config.steps else inputs[0]
    return Needs(
        read_bytes=sum(inputs[0].values()),
        written_bytes=new_bytes(made, inputs[0]),
        device=policy_memory(config, facts),
        gpu_ms=None if generating is None or learning is None else generating + learning,
        counts={"replies": replies, "tokens": replies * mean, "trainable_parameters": trainable},
        made=made,
        smaller=("max_new_tokens",),
        on_more_nodes=True,
    )


def check_inputs(config: ReinforceConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if a step cannot be learnt, or a prompt with its reply does not fit the parent's positions."""
    from moesaic.data.problems import spread_over_tasks  # it loads transformers

    if config.steps:
        stage.check_step(config)
        asked = spread_over_tasks(inputs.prompts, config.max_prompts)
        inputs.check_lengths(asked, config.efforts, config.max_new_tokens)


def check_placement(config: ReinforceConfig, placement: Placement) -> None:
    """Raise ConfigError if the engine cannot train there, or the GPUs cannot share a step's replies evenly."""
    stage.check_placement(config, placement.num_gpus, placement.on_job)


def policy_memory(config: ReinforceConfig, facts: Facts) -> dict[str, float]:
    """Memory of one process while the policy learns, by a formula: neither engine has been run at this size.

    TRL: the policy in the config's precision, ``trainable * 16``, and the states of every layer of
    ``replies_per_forward`` replies of the longest length. NeMo-RL, on each of the GPUs that share the weights: what is
    no expert in float32, experts in bfloat16, gradient and moments of what learns; the states that go into each layer,
    the logits of a row in bfloat16 and their gradient.
    """
    trainable = trainable_parameters(facts, config.trainable)
    row = facts.assumed.prompt_tokens + config.max_new_tokens
    state = facts.shape.hidden_size * (facts.child.num_layers + 1) * WIDTH[config.precision]
    if config.engine == "trl":
        return {
            "weights": resident(facts, facts.child, config.precision),
            "gradients, optimizer": trainable * TRAINED_BYTES,
            "inputs of layers": config.replies_per_forward * row * state,
        }
    ranks = facts.training_gpus
    rest = trainable_parameters(facts, get_args(Trainable))
    experts = resident(facts, facts.child, "bfloat16") - rest * WIDTH["bfloat16"]
    rows = max(1, config.replies_per_forward // ranks)
    return {
        "weights": (experts + rest * WIDTH["float32"]) / ranks,
        "gradients, optimizer": trainable * (TRAINED_BYTES - WIDTH["float32"]) / ranks,
        "inputs of layers": rows * row * state,
        "logits, gradient of them": 2 * rows * row * facts.shape.vocab_size * WIDTH["bfloat16"],
    }

"""What ``evaluate`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.costs.facts import Facts, Needs, PipelineTask, Placement, ShardSizes, model_of, reply_tokens
from moesaic.costs.generation import generation
from moesaic.costs.times import generate_ms
from moesaic.deploy.engines.needs import check_engine, requests_of
from moesaic.measure.evaluate.stage import EvaluateConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[EvaluateConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Replies = tasks * problems_per_task * efforts * epochs, each ``reply_share`` of the longest."""
    config, model = task.config, model_of(facts, inputs[0])
    replies = facts.assumed.num_tasks * config.problems_per_task * len(config.efforts) * config.epochs
    mean = reply_tokens(facts, config.max_new_tokens)
    held = generation(task.stage, facts, model, requests_of(config, facts))
    return Needs(
        read_bytes=sum(inputs[0].values()),
        device=held.device,
        host_bytes=held.host_bytes,
        gpu_ms=generate_ms(facts, model, replies, mean),
        counts={"replies": replies, "tokens": replies * mean},
    )


def check_inputs(config: EvaluateConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if a problem with its reply is longer than the parent's positions."""
    from moesaic.data.problems import first_of_each_task  # it loads transformers

    asked = first_of_each_task(inputs.tests, config.problems_per_task)
    inputs.check_lengths(asked, config.efforts, config.max_new_tokens)


def check_placement(config: EvaluateConfig, placement: Placement) -> None:
    """Raise ConfigError if the engine that replies cannot run there."""
    if config.bundle:
        check_engine(config.engine, config.bundle, placement)

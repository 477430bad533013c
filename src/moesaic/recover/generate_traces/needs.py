"""What ``generate_traces`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.costs.facts import (
    TRACE_BYTES_PER_TOKEN,
    Facts,
    Needs,
    PipelineTask,
    Placement,
    ShardSizes,
    model_of,
    reply_tokens,
)
from moesaic.costs.generation import generation
from moesaic.costs.times import generate_ms
from moesaic.deploy.engines.needs import check_engine, requests_of
from moesaic.recover.generate_traces.stage import GenerateTracesConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[GenerateTracesConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Replies = prompts * efforts * samples, each ``reply_share`` of the longest."""
    config, model = task.config, model_of(facts, inputs[0])
    replies = (config.max_prompts or facts.assumed.num_prompts) * len(config.efforts) * config.samples_per_prompt
    mean = reply_tokens(facts, config.max_new_tokens)
    held = generation(task.stage, facts, model, requests_of(config, facts))
    return Needs(
        read_bytes=sum(inputs[0].values()),
        written_bytes=replies * (mean + facts.assumed.prompt_tokens) * TRACE_BYTES_PER_TOKEN,
        device=held.device,
        host_bytes=held.host_bytes,
        gpu_ms=generate_ms(facts, model, replies, mean),
        counts={"replies": replies, "tokens": replies * mean},
    )


def check_inputs(config: GenerateTracesConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if a prompt with its reply is longer than the parent's positions."""
    from moesaic.data.problems import spread_over_tasks  # it loads transformers

    asked = spread_over_tasks(inputs.prompts, config.max_prompts)
    inputs.check_lengths(asked, config.efforts, config.max_new_tokens)


def check_placement(config: GenerateTracesConfig, placement: Placement) -> None:
    """Raise ConfigError if the engine that replies cannot run there."""
    if config.bundle:
        check_engine(config.engine, config.bundle, placement)

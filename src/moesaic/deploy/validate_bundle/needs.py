"""What ``validate_bundle`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, model_of, resident
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[ValidateBundleConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Device: the engine's share of the packed weights, and after it the reference, which is whole and unpacked.

    A bundle for TensorRT-LLM is not loaded: its files are checked, and no more.
    """
    size, target = sum(inputs[0].values()), facts.target
    if not task.config.ask_engine or (target is not None and target.engine == "tensorrt_llm"):
        return Needs(read_bytes=size)
    reference = resident(facts, model_of(facts, inputs[0]), task.config.precision) if task.config.compare_replies else 0
    share = size / (target.num_gpus if target else 1)
    return Needs(
        read_bytes=2 * size,
        device={"reference, unpacked": reference} if reference > share else {"weights": share},
        host_bytes=reference if target else 0,
        instead="compare_replies false: the reference is the whole model, unpacked, on one device",
    )


def check_inputs(config: ValidateBundleConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if a prompt with its reply is longer than what the bundle serves."""
    from moesaic.data.problems import spread_over_tasks  # it loads transformers

    if config.ask_engine:
        asked = spread_over_tasks(inputs.prompts, config.prompts_per_effort)
        inputs.check_lengths(asked, config.efforts, config.max_new_tokens, inputs.max_seq_len)

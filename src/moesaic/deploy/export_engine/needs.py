"""What ``export_engine`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.costs.block_costs import outer_bytes
from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, model_of, new_bytes, resident, retrained
from moesaic.deploy.export_engine.stage import ExportEngineConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[ExportEngineConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Links what it does not change, and hashes all of it; folding writes attention anew.

    Memory: one layer's attention; with ``compare_outputs`` the model twice, unpacked.

    Raises:
        ConfigError: if the engine cannot serve the family.
    """
    config, model = task.config, model_of(facts, inputs[0])
    for program in config.programs:
        facts.shape.family.check_adapter(program)
    folds = config.target == "tensorrt_llm" and config.kv_cache == "fp8"
    made = retrained(inputs[0], task.name, ["attention"]) if folds else inputs[0]
    size = sum(inputs[0].values())
    return Needs(
        read_bytes=size + sum(made.values()),
        written_bytes=new_bytes(made, inputs[0]),
        host_bytes=2 * resident(facts, model, "float32") if config.compare_outputs else outer_bytes(facts.shape),
        made=made,
    )


def check_inputs(config: ExportEngineConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if the parent, which is exported as the child is, cannot be served so."""
    from moesaic.deploy.export_engine.bundle import check_servable  # it loads torch

    check_servable(inputs.parent, config)

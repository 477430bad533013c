"""What ``benchmark`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.costs.block_costs import outer_bytes
from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, resident, streamed_layers
from moesaic.costs.workload import Workload
from moesaic.measure.benchmark.stage import BenchmarkConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[BenchmarkConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Every point ``repeats + 1`` times: ``prefill + output_tokens * decode`` on all GPUs.

    Memory: both models; ``by_block`` one layer unpacked and one packed, and what is outside the layers.
    """
    config = task.config
    points = [
        Workload(name="point", input_tokens=tokens, output_tokens=config.output_tokens, concurrency=batch)
        for tokens in config.input_tokens
        for batch in config.batch_sizes
    ]
    loads = [*points, *config.workloads]
    ms: float | None = None
    if facts.target is not None:
        runs = [
            (load, facts.target.model_runtime(model, load)) for load in loads for model in (facts.parent, facts.child)
        ]
        busy = sum(runtime.prefill_ms + load.output_tokens * runtime.decode_ms for load, runtime in runs)
        ms = facts.target.num_gpus * (config.repeats + 1) * busy
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs),
        device={"layers": streamed_layers(facts, config.precision), "outside the layers": outer_bytes(facts.shape)}
        if config.by_block
        else {"both models": sum(resident(facts, model, config.precision) for model in (facts.parent, facts.child))},
        gpu_ms=ms,
        counts={"points": len(loads)},
        instead="by_block true: a layer at a time",
    )


def check_inputs(config: BenchmarkConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if a point is longer than the parent's positions."""
    from moesaic.measure.benchmark.run import check_positions, list_points  # they load torch

    check_positions(inputs.parent, list_points(config))

"""What ``benchmark_serving`` needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.core.config import EmulatedCache
from moesaic.costs.facts import Facts, Needs, PipelineTask, Placement, ShardSizes, model_of
from moesaic.costs.generation import Requests, generation
from moesaic.costs.workload import Workload
from moesaic.deploy.engines.needs import check_engine
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[BenchmarkServingConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """One model at a time; every point ``repeats`` times on each, its requests and their warm-up.

    Time: ``rounds * (prefill + output_tokens * decode)`` with one round for every request of a user. Memory:
    :func:`~moesaic.costs.generation.generation`, of the workload that needs most.
    """
    config = task.config
    rounds = config.requests_per_user + config.warmup_requests_per_user
    loads = [
        Workload(name="point", input_tokens=each.input_tokens, output_tokens=each.output_tokens, concurrency=users)
        for each in config.workloads
        for users in each.concurrencies
    ]
    ms: float | None = None
    if facts.target is not None:
        runs = [
            (load, facts.target.model_runtime(model, load)) for load in loads for model in (facts.parent, facts.child)
        ]
        busy = sum(runtime.prefill_ms + load.output_tokens * runtime.decode_ms for load, runtime in runs)
        ms = facts.target.num_gpus * config.repeats * rounds * busy
    caches = (config.parent_kv_cache, config.child_kv_cache)
    loaded = [
        generation(task.stage, facts, model_of(facts, shards), _requests(config, facts, load, cache))
        for shards, cache in zip(inputs, caches, strict=True)
        for load in loads
    ]
    return Needs(
        read_bytes=config.repeats * sum(sum(each.values()) for each in inputs),
        device=max(loaded, key=lambda held: held.device_bytes).device,
        host_bytes=max(held.host_bytes for held in loaded),
        gpu_ms=ms,
        counts={
            "points": len(loads),
            "requests": 2 * config.repeats * rounds * sum(each.concurrency for each in loads),
        },
    )


def check_inputs(config: BenchmarkServingConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if a request is longer than the parent's positions."""
    from moesaic.measure.benchmark_serving.run import check_positions, list_points  # they load torch

    check_positions(inputs.parent, list_points(config))


def check_placement(config: BenchmarkServingConfig, placement: Placement) -> None:
    """Raise ConfigError if the engine cannot serve the pipeline's bundles there."""
    for bundle in placement.exports:
        check_engine(config.engine, bundle, placement)


def _requests(config: BenchmarkServingConfig, facts: Facts, load: Workload, kv_cache: EmulatedCache) -> Requests:
    return Requests(
        in_flight=load.concurrency,
        longest=load.input_tokens + load.output_tokens,
        engine=config.engine,
        precision=config.precision,
        kv_cache="bf16" if kv_cache == "bf16" else "fp8",
        num_gpus=facts.target.num_gpus if facts.target else 1,
    )

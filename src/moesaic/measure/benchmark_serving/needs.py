"""What ``benchmark_serving`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, generation_bytes
from moesaic.costs.workload import Workload
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig


def needs(task: PipelineTask[BenchmarkServingConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """One model at a time; every point ``repeats`` times on each, its requests and their warm-up.

    Time: ``rounds * (prefill + output_tokens * decode)`` with one round for every request of a user. Memory:
    :func:`~moesaic.costs.facts.generation_bytes`.
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
    return Needs(
        read_bytes=config.repeats * sum(sum(each.values()) for each in inputs),
        peak_bytes=max(generation_bytes(config.engine, config.precision, facts, each) for each in inputs),
        gpu_ms=ms,
        counts={
            "points": len(loads),
            "requests": 2 * config.repeats * rounds * sum(each.concurrency for each in loads),
        },
    )

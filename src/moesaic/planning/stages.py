"""What each stage needs; the formulas stand with them."""

import math
from collections.abc import Callable, Sequence

from moesaic import gpt_oss
from moesaic.configs import (
    BenchmarkConfig,
    BenchmarkServingConfig,
    CalibrateKvConfig,
    DistillBlocksConfig,
    DistillConfig,
    EvaluateConfig,
    ExportEngineConfig,
    GenerateTracesConfig,
    PruneModelConfig,
    RankExpertsConfig,
    ReinforceConfig,
    ScoreBlocksConfig,
    SearchArchitectureConfig,
    Workload,
)
from moesaic.costs import block_bytes, outer_bytes
from moesaic.library import variants_of
from moesaic.planning.facts import (
    WIDTH,
    Facts,
    Needs,
    Shards,
    Task,
    model_of,
    pruned_shards,
    reply_tokens,
    resident,
    retrained,
    streamed_layers,
    trainable_parameters,
    two_layers,
    whole_parent,
)
from moesaic.planning.times import forward_ms, generate_ms, learn_ms

TRAINED_BYTES = 16
"""Of a parameter that learns: float32 weight, gradient, and both moments of AdamW."""
TRACE_BYTES_PER_TOKEN = 7
"""Of a token id in JSON, its separator included."""


def _ingest(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """The parent is read once to be put into the store, under its digest."""
    parent = whole_parent(facts)
    return Needs(read_bytes=sum(parent.values()), made=parent)


def _rank_experts(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """One pass: reads all but the output head; memory of a layer unpacked, one packed, and the set's hidden states.

    ``tokens <= max_sequences * max_tokens``. Time is one forward without the head; a criterion that runs a spare expert
    per token adds ``1 / top_k`` of it, which is not counted.
    """
    config = task.config_as(RankExpertsConfig)
    tokens = config.max_sequences * config.max_tokens
    states = tokens * facts.shape.hidden_size * WIDTH[config.precision]
    head = facts.shape.vocab_size * facts.shape.hidden_size * gpt_oss.BF16_BYTES
    return Needs(
        read_bytes=sum(inputs[0].values()) - head,
        peak_bytes=streamed_layers(facts, config.precision) + states,
        gpu_ms=forward_ms(facts, model_of(facts, inputs[0]).blocks, tokens, config.max_tokens, head=False),
        counts={"tokens": tokens},
    )


def _score_blocks(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Prefix reuse: a variant of layer i takes its own layer and all later ones, over both calibration sets.

    ::

        block forwards = 2 L + sum_i n_i (L - i)           n_i variants of layer i (from 0), the parent's own included
        layers read    = 3 of each + sum_i groups_i (L - i),    groups_i = max(1, ceil((n_i - 1) / variants_per_batch))
        memory         = 1 layer unpacked, 1 packed, (1 + variants_per_batch) hidden states of both sets

    Of the hidden states, what exceeds the host's budget spills to disk; reading a layer again may find it in the page
    cache. Three of each: for the parent's run, for going on to the next layer, for the check of masking.

    Time: the parent's blocks for all of them (a variant's own block is cheaper by a little).
    """
    config = task.config_as(ScoreBlocksConfig)
    blocks, shape = model_of(facts, inputs[0]).blocks, facts.shape
    tokens = 2 * config.max_sequences * config.max_tokens
    counts = [len(variants_of(block, config.space, shape.experts_per_token)) for block in blocks]
    uses = [2 + sum(counts[: layer + 1]) for layer in range(len(blocks))]
    groups = [max(1, math.ceil((count - 1) / config.variants_per_batch)) for count in counts]
    loads = [3 + sum(groups[: layer + 1]) for layer in range(len(blocks))]
    sizes = [block_bytes(shape, block, facts.packed) for block in blocks]
    states = tokens * shape.hidden_size * WIDTH[config.precision]
    passes = [forward_ms(facts, [block], tokens, config.max_tokens, head=False) for block in blocks]
    heads = forward_ms(facts, [], tokens * (sum(counts) + 1), config.max_tokens)
    ms = None if heads is None else heads + sum(use * (one or 0.0) for use, one in zip(uses, passes, strict=True))
    return Needs(
        read_bytes=sum(load * size for load, size in zip(loads, sizes, strict=True)) + outer_bytes(shape),
        peak_bytes=streamed_layers(facts, config.precision) + (1 + config.variants_per_batch) * states,
        gpu_ms=ms,
        counts={
            "tokens": tokens,
            "variants": sum(counts),
            "replacements": sum(counts) - len(counts),
            "block_forwards": sum(uses),
            "block_forwards_without_reuse": (sum(counts) + 1) * len(blocks),
        },
    )


def _search_architecture(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """A solver on one CPU; each solve stops at its time limit."""
    config = task.config_as(SearchArchitectureConfig)
    solves = config.num_solutions + config.frontier_points + 3
    return Needs(counts={"solves": solves, "cpu_seconds_at_most": solves * config.time_limit_s})


def _prune_model(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """A copy from file to file: reads what it keeps, writes the child, holds none of it."""
    made = pruned_shards(facts, task.config_as(PruneModelConfig).candidate)
    return Needs(sum(made.values()), sum(made.values()), made=made)


def _generate_traces(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Replies = prompts * efforts * samples, each ``reply_share`` of the longest; the model as :func:`_held`."""
    config, model = task.config_as(GenerateTracesConfig), model_of(facts, inputs[0])
    replies = (config.max_prompts or facts.assumed.num_prompts) * len(config.efforts) * config.samples_per_prompt
    mean = reply_tokens(facts, config.max_new_tokens)
    return Needs(
        read_bytes=sum(inputs[0].values()),
        written_bytes=replies * (mean + facts.assumed.prompt_tokens) * TRACE_BYTES_PER_TOKEN,
        peak_bytes=_held(config, facts, inputs[0]),
        gpu_ms=generate_ms(facts, model, replies, mean),
        counts={"replies": replies, "tokens": replies * mean},
    )


def _distill_blocks(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Each changed block alone: steps * batch_tokens tokens; without steps the child is handed on as it is.

    Memory: a block of the child and one of the parent, unpacked, and the optimiser of what learns in it, for every
    layer in parallel. Time as :func:`learn_ms`, over the share of layers that changed.
    """
    config = task.config_as(DistillBlocksConfig)
    changed = sum(mine != theirs for mine, theirs in zip(facts.child.blocks, facts.parent.blocks, strict=True))
    if not config.steps:
        return Needs(made=inputs[0])
    tokens = config.steps * config.batch_tokens
    trained = trainable_parameters(facts, config.trainable) / facts.child.num_layers * TRAINED_BYTES
    learning = learn_ms(facts, tokens, config.max_tokens, config.trainable, teacher=True)
    made = retrained(inputs[0], task.name, config.trainable)
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs),
        written_bytes=_new_bytes(made, inputs[0]),
        peak_bytes=config.layers_in_parallel * (two_layers(facts, config.precision) + trained),
        gpu_ms=None if learning is None else learning * changed / facts.child.num_layers,
        counts={"tokens": tokens, "layers": changed},
        made=made,
    )


def _distill(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Tokens = steps * rows_per_step * sequence_tokens. Time: :func:`learn_ms` with a teacher.

    Memory of one of ``g`` processes, everything sharded over them, experts unpacked::

        (parent + child) parameters * precision / g + trainable * 16 / g
        + rows_per_forward * sequence * hidden * (layers + 1) * precision       inputs of layers, kept for the backward
        + 2 logits_chunk_tokens * vocab * 4                                     logits of both

    Only what learns has gradients and optimiser state. Reads the traces as well as both models.
    """
    config = task.config_as(DistillConfig)
    tokens = config.steps * config.rows_per_step * config.sequence_tokens
    shape, width, ranks = facts.shape, WIDTH[config.precision], facts.target.num_gpus if facts.target else 1
    trainable = trainable_parameters(facts, config.trainable)
    weights = sum(resident(facts, model, config.precision) for model in (facts.parent, facts.child))
    states = config.rows_per_forward * config.sequence_tokens * shape.hidden_size * (facts.child.num_layers + 1) * width
    logits = 2 * config.logits_chunk_tokens * shape.vocab_size * 4
    made = retrained(inputs[0], task.name, config.trainable) if config.steps else inputs[0]
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs) + tokens * TRACE_BYTES_PER_TOKEN,
        written_bytes=_new_bytes(made, inputs[0]),
        peak_bytes=(weights + trainable * TRAINED_BYTES) / ranks + states + logits,
        gpu_ms=learn_ms(facts, tokens, config.sequence_tokens, config.trainable, teacher=True),
        counts={
            "tokens": tokens,
            "trainable_parameters": trainable,
            "optimizer_bytes": trainable * TRAINED_BYTES,
        },
        made=made,
    )


def _reinforce(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Replies = steps * prompts_per_step * generations_per_prompt: generated, then learnt from in one pass.

    Memory of one process: the policy in the config's precision and ``trainable * 16``; NeMo-RL shards both over its
    GPUs. A reply of the longest length is kept for the backward, ``replies_per_forward`` of them at once.
    """
    config = task.config_as(ReinforceConfig)
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
        written_bytes=_new_bytes(made, inputs[0]),
        peak_bytes=weights / ranks + states,
        gpu_ms=None if generating is None or learning is None else generating + learning,
        counts={"replies": replies, "tokens": replies * mean, "trainable_parameters": trainable},
        made=made,
    )


def _average_checkpoints(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Reads what the policies do not share, writes its mean; memory of the shard outside the layers, twice."""
    shared = {key: size for key, size in inputs[0].items() if all(key in other for other in inputs)}
    own = {key: size for key, size in inputs[0].items() if key not in shared}
    means = {f"{key.split(' by ')[0]} by {task.name}": size for key, size in own.items()}
    read = len(inputs) * sum(own.values())
    return Needs(read, sum(means.values()), 2 * outer_bytes(facts.shape), made=shared | means)


def _calibrate_kv(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """One forward of the calibration set, layer by layer as in ``rank_experts``; adds two scalars a layer."""
    config, model = task.config_as(CalibrateKvConfig), model_of(facts, inputs[0])
    tokens = config.max_sequences * config.max_tokens
    states = tokens * facts.shape.hidden_size * WIDTH[config.precision]
    scales = 2 * 4 * model.num_layers
    made = retrained(inputs[0], task.name, ["attention"]) if config.fold else dict(inputs[0])
    made |= {f"scales by {task.name}": scales}
    return Needs(
        read_bytes=sum(inputs[0].values()),
        written_bytes=_new_bytes(made, inputs[0]),
        peak_bytes=streamed_layers(facts, config.precision) + states,
        gpu_ms=forward_ms(facts, model.blocks, tokens, config.max_tokens),
        counts={"tokens": tokens},
        made=made,
    )


def _evaluate(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Replies = tasks * problems_per_task * efforts * epochs, each ``reply_share`` of the longest; as :func:`_held`."""
    config, model = task.config_as(EvaluateConfig), model_of(facts, inputs[0])
    replies = facts.assumed.num_tasks * config.problems_per_task * len(config.efforts) * config.epochs
    mean = reply_tokens(facts, config.max_new_tokens)
    return Needs(
        read_bytes=sum(inputs[0].values()),
        peak_bytes=_held(config, facts, inputs[0]),
        gpu_ms=generate_ms(facts, model, replies, mean),
        counts={"replies": replies, "tokens": replies * mean},
    )


def _benchmark(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Every point ``repeats + 1`` times: ``prefill + output_tokens * decode`` on all GPUs.

    Memory: both models; ``by_block`` one layer unpacked and one packed, and what is outside the layers.
    """
    config = task.config_as(BenchmarkConfig)
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
        peak_bytes=streamed_layers(facts, config.precision) + outer_bytes(facts.shape)
        if config.by_block
        else sum(resident(facts, model, config.precision) for model in (facts.parent, facts.child)),
        gpu_ms=ms,
        counts={"points": len(loads)},
    )


def _export_engine(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """Links what it does not change, and hashes all of it; folding writes attention anew.

    Memory: one layer's attention; with ``compare_outputs`` the model twice, unpacked.
    """
    config, model = task.config_as(ExportEngineConfig), model_of(facts, inputs[0])
    folds = config.target == "tensorrt_llm" and config.kv_cache == "fp8"
    made = retrained(inputs[0], task.name, ["attention"]) if folds else inputs[0]
    size = sum(inputs[0].values())
    return Needs(
        read_bytes=size + sum(made.values()),
        written_bytes=_new_bytes(made, inputs[0]),
        peak_bytes=2 * resident(facts, model, "float32") if config.compare_outputs else outer_bytes(facts.shape),
        made=made,
    )


def _benchmark_serving(task: Task, facts: Facts, inputs: Sequence[Shards]) -> Needs:
    """One model at a time; every point ``repeats`` times on each, its requests and their warm-up.

    Time: ``rounds * (prefill + output_tokens * decode)`` with one round for every request of a user. Memory:
    :func:`_held`.
    """
    config = task.config_as(BenchmarkServingConfig)
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
        peak_bytes=max(_held(config, facts, each) for each in inputs),
        gpu_ms=ms,
        counts={
            "points": len(loads),
            "requests": 2 * config.repeats * rounds * sum(each.concurrency for each in loads),
        },
    )


def _held(
    config: GenerateTracesConfig | EvaluateConfig | BenchmarkServingConfig, facts: Facts, shards: Shards
) -> float:
    """Of a model that generates: unpacked in process and under ``moesaic``, else one GPU's share of the packed weights.

    The KV cache of a serving engine takes what is left, and is not counted.
    """
    if config.engine in ("in_process", "moesaic"):
        return resident(facts, model_of(facts, shards), config.precision)
    return sum(shards.values()) / (facts.target.num_gpus if facts.target else 1)


def _new_bytes(made: Shards, given: Shards) -> int:
    return sum(size for key, size in made.items() if key not in given)


STAGES: dict[str, Callable[[Task, Facts, Sequence[Shards]], Needs]] = {
    "ingest": _ingest,
    "rank_experts": _rank_experts,
    "score_blocks": _score_blocks,
    "search_architecture": _search_architecture,
    "prune_model": _prune_model,
    "generate_traces": _generate_traces,
    "distill_blocks": _distill_blocks,
    "distill": _distill,
    "reinforce": _reinforce,
    "average_checkpoints": _average_checkpoints,
    "calibrate_kv": _calibrate_kv,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "export_engine": _export_engine,
    "benchmark_serving": _benchmark_serving,
}
"""Stages that are not here read and write small files only."""

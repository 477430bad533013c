"""Runtime of single blocks in the serving engine: its own layers, attention, KV cache and expert kernels.

A block is timed in two models that hold nothing but it, of ``N`` and of ``2N`` layers::

    ms per block = (t(2N) - t(N)) / N             fixed part = 2 t(N) - t(2N)

so that everything outside the layers cancels: embedding, head, sampling, scheduling, the client. Both models are loaded
at once and take turns, so that a machine that slows down slows both alike. Blocks are gone through there and back:
minutes lie between the first and the last. The median of the repeats of both ways counts, and for the fixed part that
over all blocks too. That of prompts, which long ones hide in their noise, is not less than that of a decode step.

Layers have the parent's own weights, from its first layer on and again from the first where it has fewer, so that
routing is nearly its own; a smaller block keeps the experts and channels of the lowest ids. Prompts are random tokens.

Prompts are read as the engine reads them, in steps of at most ``STEP_TOKENS`` tokens: as many requests as fill one such
step, at least one, and the time is scaled by their number. Decoding is timed at the workload's mean context with all
its requests in flight; their cache is filled, not computed.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.core.progress import track
from moesaic.costs.block_costs import Runtime, mean_context
from moesaic.costs.workload import Workload
from moesaic.deploy.engines.vllm.engine import TimedJob, TimedSteps, time_steps
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, write_checkpoint
from moesaic.models.safetensors_files import StoredTensor
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.prune_model.pruning import prune_stored

STEP_TOKENS = 8192
"""Tokens of one engine step, at most; as ``export_engine`` sets it."""
_MEMORY_SHARE = 0.9
"""Of a GPU's memory, for all models together; each gets as much of it as it has of their layers."""
_MOST_STEPS = 16
_TIMEOUT_S = 3600.0
"""For the timings of one block."""


@dataclass(frozen=True)
class EngineTimes:
    """What was timed, and by whom."""

    blocks: dict[Block, dict[str, Runtime]]
    """By block and workload."""
    fixed: dict[str, Runtime]
    """By workload."""
    engine: str
    """Name, version and device."""
    relative_spread: float
    """Of the repeats of one number: their median absolute deviation over the root of their count, relative to it; the
    median over all numbers."""


def time_in_engine(
    checkpoint: Checkpoint, distinct: Sequence[Block], config: MeasureCostsConfig, scratch: Path
) -> EngineTimes:
    """Time every block under every workload.

    Raises:
        ConfigError: if there is no vLLM for this machine, or it cannot share out the blocks as asked.
        ArtifactError: if the engine refuses a block, or its KV cache holds too few requests.
        StageError: if a time is not positive, because the machine is too noisy.
    """
    if config.expert_parallel and (uneven := [each for each in distinct if each.num_experts % config.num_gpus]):
        raise ConfigError(
            f"{config.num_gpus} expert-parallel GPUs do not divide the {uneven[0].num_experts} experts of "
            f"{uneven[0].label}; offer multiples of {config.num_gpus}, or set expert_parallel to false"
        )
    found: dict[Block, list[TimedSteps]] = {block: [] for block in distinct}
    for block in track(
        [*distinct, *reversed(distinct)], 2 * len(distinct), "timing blocks in the engine, there and back"
    ):
        stacks = [[block] * (times * config.timed_layers) for times in (1, 2)]
        found[block].append(time_stacks(checkpoint, stacks, config, scratch))
    repeated = {block: _split(ways, config.timed_layers) for block, ways in found.items()}
    blocks = {block: _runtimes(block.label, each, config.workloads) for block, (each, _) in repeated.items()}
    outside = _outside([fixed for _, fixed in repeated.values()])
    spreads = [_spread(times) for each, _ in repeated.values() for times in each]
    engine = found[distinct[0]][0].engine
    return EngineTimes(blocks, _runtimes("the fixed part", outside, config.workloads), engine, median(spreads))


def write_stack(checkpoint: Checkpoint, stack: Sequence[Block], directory: Path) -> None:
    """Write a model of these layers, with the parent's weights."""
    blocks = checkpoint.architecture.blocks
    sources = [_layers_with_experts_of(block, checkpoint) for block in stack]

    def shards() -> Iterator[tuple[str, Mapping[str, Tensor | StoredTensor]]]:
        yield "model-outer", {name: checkpoint.stored(name) for name in layout.outer_specs(checkpoint.shape)}
        for layer, (block, whole) in enumerate(zip(stack, sources, strict=True)):
            source = whole[layer % len(whole)]
            tensors = {name: checkpoint.stored(name) for name in checkpoint.layer_names(source)}
            own, new = layout.layer_prefix(source), layout.layer_prefix(layer)
            narrower = block.expert_width < blocks[source].expert_width
            first = torch.arange(block.expert_width).expand(block.num_experts, -1) if narrower else None
            kept, _ = prune_stored(tensors, range(block.num_experts), first)
            yield from layer_shards(layer, {new + name.removeprefix(own): tensor for name, tensor in kept.items()})

    write_checkpoint(directory, layout.child_config(checkpoint.config, Architecture.of(stack)), shards())


def _layers_with_experts_of(block: Block, checkpoint: Checkpoint) -> list[int]:
    """The parent's layers that a block can be cut out of."""
    whole = [
        layer
        for layer, own in enumerate(checkpoint.architecture.blocks)
        if own.is_dense == block.is_dense
        and own.num_experts >= block.num_experts
        and own.expert_width >= block.expert_width
    ]
    if not whole:
        raise ArtifactError(f"no layer of {checkpoint.directory} has the experts of {block.label}")
    return whole


def time_stacks(
    checkpoint: Checkpoint, stacks: Sequence[Sequence[Block]], config: MeasureCostsConfig, scratch: Path
) -> TimedSteps:
    """Time models of these layers side by side: of every workload reading prompts, then a decode step.

    The models, written for it into scratch, are deleted once they are timed.

    Raises:
        ConfigError: if there is no vLLM for this machine.
        ArtifactError: if the engine refuses a block, or its KV cache holds too few requests.
    """
    jobs, place = [job for load in config.workloads for job in _jobs(load)], scratch / "stacks"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    bundles = []
    for number, stack in enumerate(stacks):
        model, bundle = place / f"{number}", place / f"{number}-bundle"
        write_stack(checkpoint, stack, model)
        share = _MEMORY_SHARE * len(stack) / sum(map(len, stacks))
        write_bundle(Checkpoint.open(model), bundle, _served(config, jobs, share))
        bundles.append(bundle)
    times = time_steps(bundles, jobs, config.repeats, scratch, _TIMEOUT_S)
    shutil.rmtree(place)
    return times


def prompts_per_step(load: Workload) -> int:
    """How many of a workload's prompts the engine reads in one step; of longer ones it reads one in several."""
    return max(1, min(load.concurrency, STEP_TOKENS // load.input_tokens))


def _jobs(load: Workload) -> list[TimedJob]:
    steps = max(2, min(_MOST_STEPS, load.output_tokens // 2))
    return [
        TimedJob("prefill", prompts_per_step(load), load.input_tokens),
        TimedJob("decode", load.concurrency, mean_context(load), steps),
    ]


def _served(config: MeasureCostsConfig, jobs: Sequence[TimedJob], memory_share: float) -> ExportEngineConfig:
    requests = max(job.num_requests for job in jobs)
    return ExportEngineConfig(
        target="vllm",
        kv_cache="fp8_unit" if config.kv_cache == "fp8" else "bf16",
        max_seq_len=max(job.num_tokens + job.num_steps + 1 for job in jobs),
        max_batch_size=requests,
        max_num_tokens=max(STEP_TOKENS, requests),
        tensor_parallel_size=config.num_gpus,
        expert_parallel_size=config.num_gpus if config.expert_parallel else 1,
        memory_fraction=memory_share,
        compare_outputs=False,
    )


def _split(ways: Sequence[TimedSteps], num_layers: int) -> tuple[list[list[float]], list[list[float]]]:
    """Milliseconds of one block and of everything outside the blocks, by job and repeat of all ways."""
    jobs = zip(*(zip(*way.times_ms, strict=True) for way in ways), strict=True)
    pairs = [[pair for once, twice in job for pair in zip(once, twice, strict=True)] for job in jobs]
    return (
        [[(twice - once) / num_layers for once, twice in repeats] for repeats in pairs],
        [[2 * once - twice for once, twice in repeats] for repeats in pairs],
    )


def _runtimes(what: str, times: Sequence[Sequence[float]], workloads: Sequence[Workload]) -> dict[str, Runtime]:
    """Medians, by workload; prompts are scaled to all requests of it."""
    middle = [median(repeats) for repeats in times]
    runtimes = {}
    for load, prefill, decode in zip(workloads, middle[::2], middle[1::2], strict=True):
        for phase, ms in (("prefill", prefill), ("decode", decode)):
            if ms <= 0:
                raise StageError(f"{phase} of {what} under {load.name} took {ms:.3g} ms: too noisy; raise repeats")
        runtimes[load.name] = Runtime(prefill * load.concurrency / prompts_per_step(load), decode)
    return runtimes


def _outside(blocks: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The fixed part by job and repeat, from all blocks'; of prompts at least a decode step's."""
    times = [[ms for each in blocks for ms in each[job]] for job in range(len(blocks[0]))]
    for prefill, decode in zip(times[::2], times[1::2], strict=True):
        prefill[:] = [max(ms, median(decode)) for ms in prefill]
    return times


def _spread(times: Sequence[float]) -> float:
    middle = median(times)
    return median(abs(ms - middle) for ms in times) / math.sqrt(len(times)) / middle

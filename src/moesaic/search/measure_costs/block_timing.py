"""Runtime of single blocks on this device (paper B, "measured on the target hardware").

A job is one block under one workload, reading prompts or decoding. It is timed in pairs, ``N`` calls and ``2N`` calls::

    ms per call = (t(2N) - t(N)) / N

so that what a timing costs by itself cancels. Every repeat goes through all jobs, so that a machine that slows down
slows all blocks alike; the median of the repeats counts. Blocks carry a middle layer's weights and read hidden states
that the layers before it made of random tokens, so that routing is the parent's own.

Prompts go through in parts of at most ``PREFILL_TOKENS`` tokens, as in ``moesaic.models.generation``, and one part is
timed: ``prefill`` of all requests is that time scaled by their number. Decoding appends to a cache filled to the
workload's mean context; a window layer's cache holds its window.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moesaic.core.errors import StageError
from moesaic.core.progress import track
from moesaic.costs.block_costs import Runtime, mean_context
from moesaic.costs.workload import Workload
from moesaic.models import attention, layers, layout, loading
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import PREFILL_TOKENS, GrowingLayer
from moesaic.models.layers import DecoderLayer

Phase = Literal["prefill", "decode"]
Key = tuple[Block | None, str, Phase]
"""Block (None: the fixed part), workload, phase."""
Call = Callable[[], Any]
Clock = Callable[[], float]

_PAIR_MS = 15.0
"""A timing of N calls should take about this long."""
_MOST_CALLS = 16
_KNOWN_TO = 0.05
"""A median is settled when its relative error is about this or less."""
_SERVED_WITH = "grouped_mm"
"""The expert kernel of ``moesaic.models.whole_model.load_model``."""
_POOL = (8, 64)
"""Sequences and tokens of the hidden states that timed blocks draw from."""


@dataclass(frozen=True)
class Job:
    """Something to time. ``prepare`` makes a fresh call, outside the timing; a call's time is scaled by ``scale``."""

    key: Key
    prepare: Callable[[], Call]
    scale: float = 1.0


@dataclass(frozen=True)
class Bench:
    """What all jobs share."""

    checkpoint: Checkpoint
    layer: int
    dtype: torch.dtype
    device: torch.device
    pool: Float[Tensor, "token hidden"]
    rotary: layers.Rotary

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, workloads: Sequence[Workload], dtype: torch.dtype, device: torch.device
    ) -> "Bench":
        """Run random tokens up to the layer to time."""
        layer = layer_to_time(checkpoint.architecture)
        longest = max((mean_context(workload) + workload.output_tokens for workload in workloads), default=1)
        rotary = loading.rotary(checkpoint, max(longest, _POOL[1]), dtype, device)
        ids = torch.randint(checkpoint.shape.vocab_size, _POOL, generator=torch.Generator().manual_seed(0))
        states = checkpoint.tensor(layout.EMBEDDING)[ids].to(device, dtype)
        for index in range(layer):
            block = loading.load_block(checkpoint, index, dtype, device)
            states = layers.run_block(block, states, rotary, checkpoint.architecture.blocks[index].window)
        return cls(checkpoint, layer, dtype, device, states.flatten(0, 1), rotary)

    def states(self, rows: int, tokens: int) -> Float[Tensor, "batch token hidden"]:
        """Hidden states out of the pool, in random order."""
        generator = torch.Generator().manual_seed(rows * tokens)
        index = torch.randint(len(self.pool), (rows, tokens), generator=generator)
        return self.pool[index.to(self.device)]

    def cache(self, window: int | None, rows: int, tokens: int) -> DynamicLayer:
        """A cache layer that has seen ``tokens`` tokens."""
        kept = tokens if window is None else min(tokens, window - 1)
        shape = (rows, self.checkpoint.shape.num_kv_heads, kept, self.checkpoint.shape.head_dim)
        keys = torch.rand(shape, dtype=self.dtype, device=self.device)
        if window is None:
            return GrowingLayer(keys, keys.clone())
        layer = DynamicSlidingWindowLayer(window)
        layer.lazy_initialization(keys, keys)
        layer.keys, layer.values, layer.cumulative_length = keys, keys.clone(), tokens
        return layer


def layer_to_time(parent: Architecture) -> int:
    """Of the layers with the most experts, the one nearest to the middle."""
    middle = parent.num_layers // 2
    return max(range(parent.num_layers), key=lambda layer: (parent.blocks[layer].num_experts, -abs(layer - middle)))


@torch.inference_mode()
def time_blocks(
    checkpoint: Checkpoint,
    distinct: Sequence[Block],
    workloads: Sequence[Workload],
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[Block, dict[str, Runtime]], dict[str, Runtime]]:
    """Time every block and the fixed part under every workload."""
    bench = Bench.of(checkpoint, workloads, dtype, device)
    whole = loading.load_block(checkpoint, bench.layer, dtype, device)
    whole.self_attn.config._experts_implementation = _SERVED_WITH
    sizes = sorted({(block.num_experts, block.expert_width) for block in distinct})
    sliced = {(count, width): _sized(whole, count, width) for count, width in sizes if count}
    if len(sliced) < len(sizes):
        dense = next(index for index, block in enumerate(checkpoint.architecture.blocks) if block.is_dense)
        sliced[0, 0] = loading.load_block(checkpoint, dense, dtype, device)
    jobs = [
        job
        for block in distinct
        for job in _block_jobs(bench, sliced[block.num_experts, block.expert_width], block, workloads)
    ]
    jobs += _fixed_jobs(bench, workloads)
    times = time_jobs(jobs, repeats, device)
    runtimes = {
        block: {w.name: Runtime(times[block, w.name, "prefill"], times[block, w.name, "decode"]) for w in workloads}
        for block in (*distinct, None)
    }
    fixed = runtimes.pop(None)
    return {block: runtimes[block] for block in distinct}, fixed


def _sized(whole: DecoderLayer, num_experts: int, expert_width: int) -> DecoderLayer:
    """The layer with its first experts, of this width; of one that is wider in another layer, channels repeat."""
    own = layers.expert_width(whole.mlp.experts)
    if expert_width == own:
        return layers.slice_block(whole, range(num_experts))
    channels = (torch.arange(expert_width) % own).expand(num_experts, -1)
    return layers.slice_block(whole, range(num_experts), channels)


def _block_jobs(bench: Bench, module: DecoderLayer, block: Block, workloads: Sequence[Workload]) -> Iterator[Job]:
    for workload in workloads:
        rows, context = _prefill_rows(workload), mean_context(workload)
        prompts, tokens = bench.states(rows, workload.input_tokens), bench.states(workload.concurrency, 1)

        def read(prompts: Tensor = prompts) -> Call:
            rotary = tuple(part[:, : prompts.shape[1]] for part in bench.rotary)
            new = DynamicLayer if block.window is None else lambda: DynamicSlidingWindowLayer(block.window)
            return lambda: _forward(module, block, prompts, rotary, new())

        def step(tokens: Tensor = tokens, context: int = context) -> Call:
            rotary = tuple(part[:, context : context + 1] for part in bench.rotary)
            cache = bench.cache(block.window, len(tokens), context)
            return lambda: _forward(module, block, tokens, rotary, cache)

        yield Job((block, workload.name, "prefill"), read, workload.concurrency / rows)
        yield Job((block, workload.name, "decode"), step)


def _forward(
    module: DecoderLayer, block: Block, states: Tensor, rotary: tuple[Tensor, ...], cache: DynamicLayer
) -> None:
    module.self_attn.sliding_window = block.window
    if not block.is_dense:
        layers.router_of(module).top_k = block.experts_per_token
    module(states, position_embeddings=rotary, attention_mask=None, past_key_values=cache)


def _prefill_rows(workload: Workload) -> int:
    return max(1, min(workload.concurrency, PREFILL_TOKENS // workload.input_tokens))


def _fixed_jobs(bench: Bench, workloads: Sequence[Workload]) -> Iterator[Job]:
    """The model without its layers: embedding, masks and rotations, final norm, head, and the choice of a token."""
    model = _model_without_layers(bench)

    def generate(ids: Int[Tensor, "batch token"], context: int) -> Call:
        mask = torch.ones(len(ids), context + ids.shape[1], dtype=torch.long, device=bench.device)
        positions = torch.arange(context, context + ids.shape[1], device=bench.device).expand_as(ids)
        cache = DynamicCache()
        if context:
            cache.layers = [bench.cache(None, len(ids), context)]

        def call() -> None:
            output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            output.logits[:, -1].argmax(-1)

        return call

    for workload in workloads:
        rows = _prefill_rows(workload)
        prompts = torch.zeros(rows, workload.input_tokens, dtype=torch.long, device=bench.device)
        tokens = torch.zeros(workload.concurrency, 1, dtype=torch.long, device=bench.device)
        scale, context = workload.concurrency / rows, mean_context(workload)
        yield Job((None, workload.name, "prefill"), partial(generate, prompts, 0), scale)
        yield Job((None, workload.name, "decode"), partial(generate, tokens, context))


def _model_without_layers(bench: Bench) -> nn.Module:
    attention.register()
    config = loading.layer_config(bench.checkpoint, bench.checkpoint.architecture.blocks[0])
    config.num_hidden_layers, config.layer_types = 0, []
    config._attn_implementation = attention.NAME
    family = bench.checkpoint.shape.family
    build: Callable[..., nn.Module] = family.of_transformers("ForCausalLM")
    with torch.device("meta"):
        model = build(config)
    model.get_submodule("model").rotary_emb = family.of_transformers("RotaryEmbedding")(config)
    names = layout.outer_specs(bench.checkpoint.shape)
    state = {name: bench.checkpoint.tensor(name).to(bench.dtype) for name in names}
    model.load_state_dict(state, assign=True)
    return model.to(bench.device).eval()


def time_jobs(jobs: Sequence[Job], repeats: int, device: torch.device) -> Mapping[Key, float]:
    """Milliseconds of one call of every job, scaled: the median of its repeats.

    Jobs whose repeats scatter too much for their median go through up to three times as many further rounds.

    Raises:
        StageError: if the median of a job is still not positive, because the machine is too noisy.
    """
    now_ms = _clock(device)
    calls = {job.key: _num_calls(job, now_ms) for job in jobs}
    repeated: dict[Key, list[float]] = {job.key: [] for job in jobs}
    rounds = [(repeat, job) for repeat in range(repeats) for job in jobs]
    for repeat, job in track(rounds, len(rounds), "timing blocks"):
        repeated[job.key].append(_time_pair(job, calls[job.key], repeat, now_ms))
    for repeat in range(3 * repeats):
        for job in jobs:
            if not _is_settled(repeated[job.key]):
                repeated[job.key].append(_time_pair(job, calls[job.key], repeat, now_ms))
    times = {job.key: median(repeated[job.key]) * job.scale for job in jobs}
    for (block, workload, phase), ms in times.items():
        if ms <= 0:
            what = block.label if block else "the fixed part"
            raise StageError(f"{phase} of {what} under {workload} took {ms:.3g} ms: too noisy; raise repeats")
    return times


def _time_pair(job: Job, num_calls: int, repeat: int, now_ms: Clock) -> float:
    """Milliseconds per call from N and 2N calls, the order alternating so that a steady drift cancels."""
    sizes = (1, 2) if repeat % 2 else (2, 1)
    elapsed = {size: _elapsed_ms(job.prepare(), size * num_calls, now_ms) for size in sizes}
    return (elapsed[2] - elapsed[1]) / num_calls


def _is_settled(times: Sequence[float]) -> bool:
    """Whether the median is known to about five percent: its absolute deviation over the root of the repeats."""
    middle = median(times)
    deviation = median(abs(ms - middle) for ms in times)
    return deviation / math.sqrt(len(times)) < _KNOWN_TO * middle


def _num_calls(job: Job, now_ms: Clock) -> int:
    """Warm up, then choose N so that N calls take a few milliseconds."""
    call = job.prepare()
    call()
    return max(1, min(_MOST_CALLS, round(_PAIR_MS / max(_elapsed_ms(call, 1, now_ms), 1e-3))))


def _elapsed_ms(call: Call, num_calls: int, now_ms: Clock) -> float:
    start = now_ms()
    for _ in range(num_calls):
        call()
    return now_ms() - start


def _clock(device: torch.device) -> Clock:
    """Milliseconds. On one CPU thread it stands still while another process has the core."""
    if device.type == "cuda":
        return partial(_synchronised_ms, device)
    if torch.get_num_threads() == 1:
        return lambda: 1e3 * time.thread_time()
    return lambda: 1e3 * time.perf_counter()


def _synchronised_ms(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()

"""What decides the cost model of gpt-oss-120b, measured on one GPU.

Times are of vLLM's own layers, with their true sizes and random weights; a model of two layers less one of one layer is
a block. Beside each stands what the table of ``moesaic.costs.hardware`` says of it.

- a mixture of 128 experts against 64 and 32, top-4 against top-2, width 2880 against 1440, at 64 to 512 requests;
- a decode step's attention at a window of 128, of 8192 and without one, at 64K tokens of context, cache BF16 and FP8;
- a model of all these blocks against the sum of them;
- the memory of a step of distillation of two layers of true width, rows of 32K tokens, against the simulation.

All models of one cache are loaded at once, in one process, and take turns; the sizes are for a GPU of 141 GB and ten
minutes. On a CPU ``--small`` runs the same at sizes where it is a test of this script and no more. vLLM's environment
is made once.

Run: python benchmarks/gpu_costs.py [--small] [--record FILE]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bars import conclude, return_freed_memory
from distill_memory import SMALL as SMALL_STEP
from distill_memory import rank_0_of_two

from moesaic.core.config import CacheDtype
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.workload import Workload
from moesaic.deploy.engines.vllm.environment import why_unsupported
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import GPT_OSS_120B
from moesaic.models.synthesis import Model, write_synthetic
from moesaic.recover.distill.stage import DistillConfig
from moesaic.search.measure_costs.engine_timing import prompts_per_step, time_stacks
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.space import SearchSpace


@dataclass(frozen=True)
class Sizes:
    """A model and what is asked of it."""

    shape: ModelShape
    base: Block
    """Every other block is this one but for one axis."""
    experts: tuple[Block, ...]
    """Other mixtures."""
    windows: tuple[Block, ...]
    """Other attention."""
    batches: tuple[int, ...]
    """Requests of a decode step, at a short context."""
    short_tokens: int
    long: Workload
    distill: DistillConfig
    repeats: int

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """One per batch, and the long one."""
        short = {"input_tokens": self.short_tokens, "output_tokens": self.long.output_tokens}
        return (*(Workload(name=f"batch {batch}", concurrency=batch, **short) for batch in self.batches), self.long)


def _around(base: Block, experts: Sequence[Mapping[str, int]], windows: Sequence[int | None]) -> dict[str, Any]:
    return {
        "base": base,
        "experts": tuple(replace(base, **change) for change in experts),
        "windows": tuple(replace(base, window=window) for window in windows),
    }


FULL = Sizes(
    shape=replace(GPT_OSS_120B, vocab_size=32_768),
    **_around(
        Block(128, 4, 2880, 128),
        [{"num_experts": 64}, {"num_experts": 32}, {"experts_per_token": 2}, {"expert_width": 1440}],
        [8192, None],
    ),
    batches=(64, 128, 256, 512),
    short_tokens=128,
    long=Workload(name="64K", input_tokens=65_536, output_tokens=64, concurrency=16),
    distill=DistillConfig(sequence_tokens=32_768, rows_per_step=2),
    repeats=9,
)
SMALL = Sizes(
    shape=replace(GPT_OSS_120B, hidden_size=256, num_heads=8, num_kv_heads=1, vocab_size=4096, max_positions=8192),
    **_around(
        Block(8, 2, 256, 128),
        [{"num_experts": 4}, {"experts_per_token": 1}, {"expert_width": 128}],
        [512, None],
    ),
    batches=(2, 8),
    short_tokens=64,
    long=Workload(name="long", input_tokens=2048, output_tokens=16, concurrency=2),
    distill=SMALL_STEP,
    repeats=3,
)


def main() -> None:
    """Measure, and set what the model says beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a test of this script, for a CPU")
    parser.add_argument("--record", type=Path, help="file to write")
    given = parser.parse_args()
    if why := why_unsupported():
        sys.exit(f"vLLM cannot time anything here: {why}")
    if not given.small and not torch.cuda.is_available():
        sys.exit("no GPU is here, and on a CPU the true sizes take hours; --small is for CPUs")
    return_freed_memory()
    sizes = SMALL if given.small else FULL
    first, last = sizes.base, sizes.windows[-1]
    child = Architecture.of([replace(first, num_experts=first.num_experts // 2), last])
    print("a step of distillation, measured and simulated", file=sys.stderr)
    memory = rank_0_of_two(sizes.distill, sizes.shape, Architecture.of([first, last]), child)
    found = {"bf16": timed(sizes, "bf16", [sizes.base, *sizes.experts, *sizes.windows])}
    if why := why_unsupported(fp8_cache=True):
        print(f"no FP8 cache here: {why}", file=sys.stderr)
    else:
        found["fp8"] = timed(sizes, "fp8", [sizes.base, *sizes.windows])
    conclude(f"python benchmarks/gpu_costs.py{' --small' * given.small}", (), found | {"distill": memory}, given.record)


def timed(sizes: Sizes, kv_cache: CacheDtype, blocks: Sequence[Block]) -> dict[str, Any]:
    """Milliseconds of blocks by workload and phase, measured and modelled, and of all of them in one model."""
    config = MeasureCostsConfig(
        space=SearchSpace(expert_counts=(sizes.base.num_experts,), windows=()),
        workloads=sizes.workloads,
        engine="vllm",
        kv_cache=kv_cache,
        repeats=sizes.repeats,
    )
    with TemporaryDirectory() as place:
        scratch, parent = Path(place), Path(place) / "parent"
        write_synthetic(Model(sizes.shape, Architecture.of([sizes.base]), 1), parent)
        stacks = [[sizes.base], *([sizes.base, block] for block in blocks), list(blocks)]
        print(f"{len(stacks)} models with a cache in {kv_cache}, {len(config.workloads)} workloads", file=sys.stderr)
        steps = time_stacks(Checkpoint.open(parent), stacks, config, scratch)
    target = Target(read_table(config.hardware), sizes.shape, 1, kv_cache)
    one, *pairs, whole = ([median(repeats) for repeats in model] for model in steps.times_ms)
    phases = [
        (load, phase, scale)
        for load in sizes.workloads
        for phase, scale in (("prefill", load.concurrency / prompts_per_step(load)), ("decode", 1.0))
    ]
    rows: dict[str, dict[str, Any]] = {}
    for job, (load, phase, scale) in enumerate(phases):
        measured = [scale * (pair[job] - one[job]) for pair in pairs]
        modelled = [getattr(target.block_runtime(block, load), f"{phase}_ms") for block in blocks]
        rows[f"{load.name}, {phase}"] = {
            "measured_ms": _by(blocks, measured),
            "modelled_ms": _by(blocks, modelled),
            "measured_over_base": _by(blocks, [each / measured[0] for each in measured]),
            "modelled_over_base": _by(blocks, [each / modelled[0] for each in modelled]),
            "whole_ms": scale * whole[job],
            "sum_ms": scale * one[job] - measured[0] + sum(measured),
        }
    return {"engine": steps.engine, "times": rows}


def _by(blocks: Sequence[Block], figures: Sequence[float]) -> dict[str, float]:
    return {block.label: figure for block, figure in zip(blocks, figures, strict=True)}


if __name__ == "__main__":
    main()

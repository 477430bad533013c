"""Libraries small enough to try every assembly, and the oracle that does."""

import math
import random
from itertools import product

from moesaic.costs.block_costs import BlockCost, CostTable, FixedCost, Runtime, WorkloadCost
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.search.library import BlockLibrary, Choice, total
from moesaic.search.search_architecture.stage import SearchArchitectureConfig

WORKLOADS = (
    Workload(name="long", input_tokens=64, output_tokens=64, concurrency=4),
    Workload(name="short", input_tokens=8, output_tokens=8, concurrency=16),
)


def make_library(
    seed: int,
    num_layers: int = 4,
    counts: tuple[int, ...] = (8, 4),
    engine: TargetEngine = "moesaic",
    used: tuple[int, ...] = (2,),
) -> BlockLibrary:
    """Windows of 4 on even layers; full layers may become 16 or 8. Smaller blocks cost less, damages are random.

    ``counts`` are of experts, ``used`` of experts per token.
    """
    generator = random.Random(seed)
    parent = Architecture.of(Block(max(counts), max(used), 64, None if layer % 2 else 4) for layer in range(num_layers))
    blocks = [Block(count, top_k, 64, window) for count in counts for top_k in used for window in (None, 16, 8, 4)]

    def cost(block: Block) -> BlockCost:
        kept = block.window or 128
        workloads = {
            workload.name: WorkloadCost(
                prefill_ms=block.num_experts * generator.uniform(0.8, 1.2),
                decode_ms=block.num_experts * block.experts_per_token * generator.uniform(0.04, 0.06)
                + kept * generator.uniform(0.008, 0.012),
                kv_bytes=kept * 1024,
            )
            for workload in WORKLOADS
        }
        return BlockCost(block.num_experts * 100_000, block.num_experts * 50_000, "in_process", workloads)

    fixed = FixedCost(500_000, 1_000_000, "in_process", {workload.name: Runtime(3.0, 0.2) for workload in WORKLOADS})
    costs = CostTable(parent, {}, "bf16", engine, WORKLOADS, fixed, {block: cost(block) for block in blocks})
    damages = {}
    for layer, whole in enumerate(parent.blocks):
        for block in blocks:
            if block.window == whole.window or (whole.window is None and block.window != 4):
                damages[layer, block] = 0.0 if block == whole else generator.uniform(0.01, 1)
    return BlockLibrary.of(parent, damages, costs)


def every_choice(library: BlockLibrary) -> list[Choice]:
    return list(product(*(range(len(options)) for options in library.variants)))


def keeps(library: BlockLibrary, config: SearchArchitectureConfig, choice: Choice) -> bool:
    """The limits written out once more, from the assembly's cost alone."""
    architecture = library.architecture(choice)
    child, parent = (library.costs.evaluate(each) for each in (architecture, library.parent))
    full = [layer for layer, block in enumerate(library.parent.blocks) if block.window is None]
    turned = sum(architecture.blocks[layer].window is not None for layer in full)
    holds = turned >= config.min_windowed_share * len(full) - 1e-9
    holds &= config.max_layouts is None or len(architecture.layouts) <= config.max_layouts
    holds &= child.parameters <= (config.max_parameters_ratio or math.inf) * parent.parameters
    holds &= child.num_experts <= (config.max_experts_ratio or math.inf) * parent.num_experts
    for name, limits in config.limits.items():
        holds &= child.memory_mib[name] <= (limits.memory_ratio or math.inf) * parent.memory_mib[name]
        holds &= child.latency_ms[name] <= (limits.latency_ratio or math.inf) * parent.latency_ms[name]
        speed = child.throughput_tokens_per_s[name] / parent.throughput_tokens_per_s[name]
        holds &= speed >= (limits.throughput_ratio or 0)
    return holds


def brute_force(library: BlockLibrary, config: SearchArchitectureConfig) -> float | None:
    damages = [total(library.damages, choice) for choice in every_choice(library) if keeps(library, config, choice)]
    return min(damages, default=None)

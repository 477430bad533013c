"""A search over gpt-oss-120b's 36 layers with the H100 table: the frontier, and where the released layout lies.

Costs are modelled (``moesaic.costs.hardware``). DAMAGE SCORES ARE MADE UP, by a formula that is stated in ``damage``
and seeded noise: real ones need the weights. What the script shows is how costs, limits and the KV allocator shape the
answer, not which layers matter. Shape of the formula: damage grows with the share of experts removed and with the
logarithm of how far a window shortens the view; experts matter more in early layers; windows hurt most in the middle.

Run: python benchmarks/h100_search.py [--record FILE]
"""

import argparse
import datetime
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moesaic
from moesaic.costs.block_costs import (
    BlockCost,
    CostTable,
    FixedCost,
    WorkloadCost,
    block_bytes,
    block_parameters,
    full_length,
    layer_kv_bytes,
    least_padding_group_size,
    outer_bytes,
    outer_parameters,
    stock_group_size,
)
from moesaic.costs.hardware import Target, model_blocks
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.throughput import estimate_throughput
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.models.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
from moesaic.search.library import BlockLibrary, distinct_blocks, total, variants_of
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.search_architecture.search import Search, Solution
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.space import SearchSpace

H100 = read_table("h100")
PARENT, RELEASED = GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
SPACE = SearchSpace(
    expert_counts=(128, 112, 96, 80, 64, 48, 32, 16), windows=(8192, 4096, 1024), expert_parallel_size=8
)
LONG = Workload(name="long", input_tokens=65_536, output_tokens=65_536, concurrency=1)
SHORT = Workload(name="short", input_tokens=4096, output_tokens=4096, concurrency=1)
NOISE, SEED = 0.25, 0


def config_of(num_gpus: int) -> MeasureCostsConfig:
    """Both workloads at as many requests as the released layout holds on so many GPUs."""
    target = Target(H100, GPT_OSS_120B, num_gpus, "fp8")
    group = least_padding_group_size(RELEASED.layouts)
    loads = tuple(
        load.model_copy(update={"concurrency": estimate_throughput(target, RELEASED, load, group).requests})
        for load in (LONG, SHORT)
    )
    return MeasureCostsConfig(
        space=SPACE, workloads=loads, source="model", hardware="h100", num_gpus=num_gpus, kv_cache="fp8"
    )


def damage(layer: int, block: Block, noise: Mapping[tuple[int, str], float]) -> float:
    """Made up: ``a_i (removed share)^1.5 + w_i log2(131072 / window) / 8``, each times 1 +- 25 % by layer.

    ``a_i`` falls from 1.5 in the first layer to 0.5 in the last; ``w_i = 0.2 + 0.8 sin(pi i / 35)``. A window of 8192
    then costs about what halving the experts of an average layer does.
    """
    depth = layer / (PARENT.num_layers - 1)
    experts = (1.5 - depth) * (1 - block.num_experts / 128) ** 1.5 * noise[layer, "experts"]
    if block.window is None or PARENT.blocks[layer].window is not None:
        return experts
    shortened = math.log2(GPT_OSS_120B.max_positions / block.window) / 8
    return experts + (0.2 + 0.8 * math.sin(math.pi * depth)) * shortened * noise[layer, "window"]


def library(num_gpus: int) -> BlockLibrary:
    """Made-up damages and modelled costs of every variant of every layer."""
    draws = random.Random(SEED)
    noise = {(layer, kind): 1 + NOISE * draws.uniform(-1, 1) for layer in range(36) for kind in ("experts", "window")}
    damages = {
        (layer, block): damage(layer, block, noise)
        for layer, own in enumerate(PARENT.blocks)
        for block in variants_of(own, SPACE, GPT_OSS_120B.experts_per_token)
    }
    return BlockLibrary.of(PARENT, damages, cost_table(config_of(num_gpus)))


def cost_table(config: MeasureCostsConfig) -> CostTable:
    """The modelled costs, as ``measure_costs`` writes them."""
    distinct = distinct_blocks(PARENT, SPACE, GPT_OSS_120B.experts_per_token)
    runtimes, fixed = model_blocks(
        Target(H100, GPT_OSS_120B, config.num_gpus, config.kv_cache), distinct, config.workloads
    )
    blocks = {}
    for block in distinct:
        workloads = {
            load.name: WorkloadCost(
                runtimes[block][load.name].prefill_ms,
                runtimes[block][load.name].decode_ms,
                layer_kv_bytes(GPT_OSS_120B, block.window, full_length(load), "fp8"),
            )
            for load in config.workloads
        }
        blocks[block] = BlockCost(
            block_parameters(GPT_OSS_120B, block), block_bytes(GPT_OSS_120B, block), "modelled", workloads
        )
    outer = FixedCost(outer_parameters(GPT_OSS_120B), outer_bytes(GPT_OSS_120B), fixed)
    hardware = {"device": H100.name, "date": H100.date, "num_gpus": config.num_gpus}
    return CostTable(PARENT, hardware, "fp8", config.workloads, outer, blocks)


def describe(found: BlockLibrary, model: Architecture, group_size: int | None) -> dict[str, Any]:
    """One assembly in figures; ratios are to the parent, throughput at most requests that fit."""
    costs, parent = (found.costs.evaluate(each, group_size) for each in (model, PARENT))
    return {
        "damage": round(total(found.damages, found.choice(model)), 4),
        "parameters_b": round(costs.parameters / 1e9, 2),
        "experts": model.num_experts,
        "layouts": {str(window or "full"): count for window, count in model.layouts.items()},
        "kv_group_size": group_size,
        "memory_long_ratio": round(costs.memory_mib["long"] / parent.memory_mib["long"], 3),
        "throughput_ratio": {
            name: round(costs.throughput_tokens_per_s[name] / parent.throughput_tokens_per_s[name], 3)
            for name in ("long", "short")
        },
        "served_ratio": {
            f"{num_gpus}x {load.name}": _served_ratio(model, load, num_gpus)
            for num_gpus in (1, 8)
            for load in (LONG, SHORT)
        },
        "kv_bytes_stock_groups_ratio": round(_kv(found, model, stock_group_size(model.layouts)), 3),
        "kv_bytes_least_padding_ratio": round(_kv(found, model, least_padding_group_size(model.layouts)), 3),
    }


def _served_ratio(model: Architecture, load: Workload, num_gpus: int) -> float:
    target = Target(H100, GPT_OSS_120B, num_gpus, "fp8")
    whole = estimate_throughput(target, PARENT, load)
    return round(
        estimate_throughput(target, model, load, least_padding_group_size(model.layouts)).tokens_per_s
        / whole.tokens_per_s,
        3,
    )


def _kv(found: BlockLibrary, model: Architecture, group_size: int) -> float:
    """Cache of one long request over the parent's, whose two equal groups pad nothing."""

    def used(each: Architecture, size: int) -> float:
        return sum(
            found.costs.kv_bytes(window, "long") * (-(-count // size) * size) for window, count in each.layouts.items()
        )

    return used(model, group_size) / used(PARENT, 18)


def search(found: BlockLibrary, group_size: int | None, points: int) -> tuple[list[Solution], Solution]:
    """The frontier of damage against long throughput, and the best assembly at the released layout's own figures.

    Memory and short throughput are limited to the released layout's throughout.
    """
    released = found.costs.evaluate(RELEASED, least_padding_group_size(RELEASED.layouts))
    memory, speed = released.memory_mib, released.throughput_tokens_per_s
    limits = {name: Limits(memory_mib=memory[name], throughput_tokens_per_s=speed[name]) for name in ("long", "short")}
    config = SearchArchitectureConfig(
        limits=limits, kv_group_size=group_size, frontier_points=points, time_limit_s=60, relative_gap=1e-3
    )
    problem = Search.of(found, config)
    best = problem.best()
    return problem.frontier()[1], best


def report(points: int) -> dict[str, Any]:
    """Everything: the released layout, the best at its figures, and the frontier, for two allocators."""
    group = least_padding_group_size(RELEASED.layouts)
    content: dict[str, Any] = {
        "assumption": "damage scores are made up, see the script's damage(); costs are modelled",
        "seed": SEED,
        "table": f"{H100.name} {H100.date}",
        "limits": "memory, long and short throughput of the released layout; the frontier sweeps long throughput",
        "searches": [],
    }
    for num_gpus in (8, 1):
        found = library(num_gpus)
        for allocator, size in (("groups of 9 layers", 9), ("no padding", None)):
            frontier, best = search(found, size, points)
            content["searches"].append(
                {
                    "num_gpus": num_gpus,
                    "allocator": allocator,
                    "requests": {load.name: load.concurrency for load in found.costs.workloads},
                    "parent": describe(found, PARENT, None),
                    "released": describe(found, RELEASED, group),
                    "best_at_released_figures": _solved(found, best, size),
                    "frontier": [_solved(found, point, size) for point in frontier],
                }
            )
    return content


def _solved(found: BlockLibrary, solution: Solution, group_size: int | None) -> dict[str, Any]:
    how = {"status": solution.status, "gap": solution.gap, "seconds": round(solution.seconds or 0, 2)}
    blocks = [block.label for block in solution.architecture.blocks]
    return describe(found, solution.architecture, group_size) | how | {"blocks": blocks}


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"Note: {found['assumption']}.")
    titles = ("damage", "experts", "long", "short", "memory", "KV stock", "KV least")
    for part in found["searches"]:
        print(f"\n{part['num_gpus']}xH100, {part['allocator']}, requests {part['requests']}")
        print(" " * 34 + "".join(f"{title:>9}" for title in titles) + "  layouts")
        rows = {"parent": part["parent"], "released layout": part["released"]}
        rows["best at the released one's figures"] = part["best_at_released_figures"]
        rows |= {f"frontier {index}": point for index, point in enumerate(part["frontier"])}
        for name, row in rows.items():
            values = (
                row["throughput_ratio"]["long"],
                row["throughput_ratio"]["short"],
                row["memory_long_ratio"],
                row["kv_bytes_stock_groups_ratio"],
                row["kv_bytes_least_padding_ratio"],
            )
            layouts = " ".join(f"{count}x{window}" for window, count in row["layouts"].items())
            cells = "".join(f"{value:9.2f}" for value in values)
            print(f"{name:34}{row['damage']:9.3f}{row['experts']:9d}{cells}  {layouts}")


def main() -> None:
    """Search, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="also write everything here")
    parser.add_argument("--points", type=int, default=10, help="points of each frontier (%(default)s)")
    given = parser.parse_args()
    found = report(given.points)
    show(found)
    if given.record:
        command = {
            "command": f"python benchmarks/h100_search.py --points {given.points}",
            "date": datetime.date.today().isoformat(),
            "moesaic": moesaic.__version__,
        }
        given.record.write_text(json.dumps(command | found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A search over gpt-oss-120b's 36 layers with the H100 table: the frontier, and where the released layout lies.

Costs are modelled (``moesaic.costs.hardware``). DAMAGE SCORES ARE MADE UP, by a formula that is stated in ``damage``:
real ones need the weights. What the script shows is how costs, limits and the KV allocator shape the answer, not which
layers matter. The formula follows the released layout: early layers need their experts more than late ones, layers of
full attention less than their neighbours, and the layers whose window was released lose least by one.

Run: python benchmarks/h100_search.py [--record FILE]
"""

import argparse
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moesaic
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.costs.throughput import estimate_throughput
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import gpt_oss_120b_h100x1, gpt_oss_120b_h100x8
from moesaic.search.library import BlockLibrary, total, variants_of
from moesaic.search.measure_costs.run import model_costs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.search_architecture.search import Search, Solution

H100 = read_table("h100")
PARENT, RELEASED = GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
RECIPES: Mapping[int, Recipe] = {8: gpt_oss_120b_h100x8(), 1: gpt_oss_120b_h100x1()}
"""By number of GPUs; the searches' limits and workloads are theirs."""
ENGINES: tuple[TargetEngine, ...] = ("tensorrt_llm", "vllm_puzzle", "vllm")


def damage(layer: int, block: Block) -> float:
    """Made up: ``a_i`` times the removed share of experts, thrice that for what goes beyond a half, and ``w_i``.

    ``a_i = (54 - i) / 36``, and 6/36 more in layers that the parent windows. ``w_i`` of a window of 8192 tokens is 0.3
    in the layers that the release windows, else 1, and grows by half with every halving of the window.
    """
    removed = 1 - block.num_experts / 128
    needed = (54 - layer + (0 if PARENT.blocks[layer].window is None else 6)) / 36
    experts = needed * (removed + 2 * max(0.0, removed - 0.5))
    if block.window is None or PARENT.blocks[layer].window is not None:
        return experts
    window = 0.3 if RELEASED.blocks[layer].window is not None else 1.0
    return experts + window * (1 + 0.5 * math.log2(8192 / block.window))


def library(config: MeasureCostsConfig) -> BlockLibrary:
    """Made-up damages and modelled costs of every variant of every layer."""
    damages = {
        (layer, block): damage(layer, block)
        for layer, own in enumerate(PARENT.blocks)
        for block in variants_of(own, config.space)
    }
    return BlockLibrary.of(PARENT, damages, model_costs(config, GPT_OSS_120B, PARENT))


def describe(found: BlockLibrary, config: MeasureCostsConfig, model: Architecture) -> dict[str, Any]:
    """One assembly in figures; ratios are to the parent, for throughput also at the most requests that each holds."""
    costs, parent = found.costs.evaluate(model), found.costs.evaluate(PARENT)
    target = Target(
        H100, GPT_OSS_120B, config.num_gpus, config.kv_cache, config.engine, expert_parallel=config.expert_parallel
    )
    served = {
        load.name: [estimate_throughput(target, each, load).tokens_per_s for each in (model, PARENT)]
        for load in config.workloads
    }
    same = costs.throughput_tokens_per_s
    return {
        "damage": round(total(found.damages, found.choice(model)), 4),
        "parameters_b": round(costs.parameters / 1e9, 2),
        "experts": model.num_experts,
        "layouts": {str(window or "full"): count for window, count in model.layouts.items()},
        "memory_ratio": {name: round(costs.memory_mib[name] / parent.memory_mib[name], 3) for name in same},
        "tokens_per_s": {name: round(speed) for name, speed in same.items()},
        "throughput_ratio": {name: round(same[name] / parent.throughput_tokens_per_s[name], 3) for name in same},
        "served_ratio": {name: round(child / whole, 3) for name, (child, whole) in served.items()},
        "blocks_of_released": sum(mine == theirs for mine, theirs in zip(model.blocks, RELEASED.blocks, strict=True)),
    }


def report(points: int) -> dict[str, Any]:
    """Everything: the released layout, the best at the recipe's limits, and the frontier, for every allocator."""
    content: dict[str, Any] = {
        "assumption": "damage scores are made up, see the script's damage(); costs are modelled",
        "table": f"{H100.name} {H100.date}",
        "searches": [],
    }
    for num_gpus, recipe in RECIPES.items():
        for engine in ENGINES:
            config = recipe.measure_costs.but(engine=engine)
            found = library(config)
            search = Search.of(found, recipe.search_architecture.but(frontier_points=points))
            content["searches"].append(
                {
                    "num_gpus": num_gpus,
                    "engine": engine,
                    "requests": {load.name: load.concurrency for load in config.workloads},
                    "limits": [limit.describe() for limit in search.limits.linear],
                    "parent": describe(found, config, PARENT),
                    "released": describe(found, config, RELEASED),
                    "broken_by_released": search.limits.broken(found.choice(RELEASED)),
                    "best": _solved(found, config, search.best()),
                    "frontier": [_solved(found, config, point) for point in search.frontier()[1]],
                }
            )
    return content


def _solved(found: BlockLibrary, config: MeasureCostsConfig, solution: Solution) -> dict[str, Any]:
    how = {"status": solution.status, "gap": solution.gap}
    blocks = [block.label for block in solution.architecture.blocks]
    return describe(found, config, solution.architecture) | how | {"blocks": blocks}


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"Note: {found['assumption']}.")
    for part in found["searches"]:
        print(f"\n{part['num_gpus']}xH100, {part['engine']}, requests {part['requests']}: {'; '.join(part['limits'])}")
        print("released layout breaks", "; ".join(part["broken_by_released"]) or "none of them")
        titles = ("damage", "experts", "as rel.", "long", "served", "short", "memory")
        print(" " * 18 + "".join(f"{title:>9}" for title in titles) + "  layouts")
        rows = {"parent": part["parent"], "released layout": part["released"], "best": part["best"]}
        rows |= {f"frontier {index}": point for index, point in enumerate(part["frontier"])}
        for name, row in rows.items():
            ratios = (row["throughput_ratio"]["long"], row["served_ratio"]["long"], row["throughput_ratio"]["short"])
            layouts = " ".join(f"{count}x{window}" for window, count in row["layouts"].items())
            cells = "".join(f"{value:9.3f}" for value in (*ratios, row["memory_ratio"]["long"]))
            print(f"{name:18}{row['damage']:9.3f}{row['experts']:9d}{row['blocks_of_released']:9d}{cells}  {layouts}")


def main() -> None:
    """Search, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="also write everything here")
    parser.add_argument("--points", type=int, default=6, help="points of each frontier (%(default)s)")
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

"""Join scores and costs, solve for the best assemblies, and compare them with the baselines at equal budget."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError, InfeasibleError
from moesaic.core.progress import track
from moesaic.costs.block_costs import CostTable
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape
from moesaic.models.resolved_config import read_config_file
from moesaic.models.stage_outputs import read_json, read_text
from moesaic.search.library import BlockLibrary, Choice
from moesaic.search.search_architecture.baselines import baselines, choose_greedily
from moesaic.search.search_architecture.search import Search, Solution
from moesaic.search.search_architecture.stage import SearchArchitectureConfig

ARCHITECTURE = "architecture.json"


def run(
    config: SearchArchitectureConfig, *, parent: Path, scores: Path, costs: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write ``architecture.json``: the parent, the candidates by name, the frontier, and what was left out and why.

    Candidates are ``puzzle``, the diverse ``puzzle-2``, ``puzzle-3``, ..., and the baselines, see ``baselines.py``.
    """
    search = read_search(config, parent, scores, costs)
    candidates, skipped = find_candidates(search)
    swept, frontier = search.frontier()
    whole = search.assembled(search.library.parent_choice, "parent")
    content = {
        "config": config.model_dump(mode="json"),
        "parent": describe(whole),
        "candidates": {name: describe(solution) for name, solution in candidates.items()},
        "skipped": skipped,
        "swept": swept,
        "frontier": [describe(solution) for solution in frontier],
        "limits": _describe_limits(search),
        "is_sorting": search.is_sorting,
    }
    (output / ARCHITECTURE).write_text(json.dumps(content, indent=1) + "\n")
    return _metrics(whole, candidates)


def read_search(config: SearchArchitectureConfig, parent: Path, scores: Path, costs: Path) -> Search:
    """Join a parent's scores and costs under a config's limits.

    Raises:
        ArtifactError: if they do not belong together.
    """
    table = CostTable.from_json(read_text(costs / "costs.json"))
    shape, blocks = layout.read_config(read_config_file(parent))
    _check_parent(table, shape, blocks)
    return Search.of(_read_library(scores / "scores.json", blocks, table), config, time.perf_counter)


def find_candidates(search: Search) -> tuple[dict[str, Solution], dict[str, str]]:
    """Every candidate by name, the search's best first, and the reason for each that could not be had.

    Raises:
        InfeasibleError: if nothing keeps the limits.
    """
    diverse = search.diverse(search.best(_start(search)))
    names = ["puzzle", *(f"puzzle-{rank}" for rank in range(2, search.config.num_solutions + 1))]
    why = f"no further assembly within the limits shares at most {search.most_in_common} blocks with each earlier one"
    compared: dict[str, Solution] = {}
    skipped = dict.fromkeys(names[len(diverse) :], why)
    rivals = baselines(search, diverse[0])
    for name, find in track(rivals.items(), len(rivals), "baselines"):
        try:
            solution = find()
        except InfeasibleError as reason:
            skipped[name] = str(reason)
            continue
        twins = [other for other, known in compared.items() if known.assembly == solution.assembly]
        if twins and name in search.config.baselines:  # Of random ones each seed counts.
            skipped[name] = f"the same assembly as {twins[0]}"
        else:
            compared[name] = solution
    return dict(zip(names, diverse, strict=False)) | compared, skipped


def _start(search: Search) -> Choice | None:
    """The greedy choice, from which the solver begins; None if greedy ends outside the limits."""
    try:
        return choose_greedily(search)
    except InfeasibleError:
        return None


def _check_parent(table: CostTable, shape: ModelShape, blocks: Architecture) -> None:
    if table.parent != blocks:
        raise ArtifactError("costs.json is of another parent than the one given; run measure_costs on this parent")
    costed, real = table.evaluate(blocks).parameters, layout.num_parameters(shape, blocks)
    if costed != real:
        raise ArtifactError(f"costs.json counts {costed} parameters, the parent has {real}; run measure_costs on it")


def _read_library(path: Path, parent: Architecture, table: CostTable) -> BlockLibrary:
    content = read_json(path)
    try:
        scored = Architecture.of(Block.from_config(entry) for entry in content["parent"])
        damages = {(row["layer"], Block.from_config(row)): float(row["damage"]) for row in content["rows"]}
        num_rows = len(content["rows"])
    except (KeyError, TypeError, ValueError) as broken:
        raise ArtifactError(f"{path} cannot be read ({broken!r}); run score_blocks again") from broken
    if scored != parent:
        raise ArtifactError(f"{path.name} is of another parent than the one given; run score_blocks on this parent")
    if len(damages) < num_rows:
        raise ArtifactError(f"{path.name} scores the same block of a layer twice; run score_blocks again")
    return BlockLibrary.of(parent, damages, table)


def describe(solution: Solution) -> dict[str, Any]:
    """A candidate's entry in ``architecture.json``."""
    return {
        "blocks": [block.as_config() for block in solution.architecture.blocks],
        "keeps": solution.keeps,
        "damage": solution.known_damage,
        **asdict(solution.cost),
        "breaks": list(solution.breaks),
        "status": solution.status,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
    }


def _describe_limits(search: Search) -> dict[str, Any]:
    limits: dict[str, Any] = {
        limit.name: {"at_least" if limit.at_least else "at_most": limit.shown(limit.bound), "unit": limit.unit}
        for limit in search.limits.linear
    }
    if search.limits.max_layouts is not None:
        limits["distinct windows"] = {"at_most": search.limits.max_layouts, "unit": ""}
    return limits


def _metrics(parent: Solution, candidates: Mapping[str, Solution]) -> dict[str, float]:
    best = candidates["puzzle"]
    metrics = {
        "damage": best.damage,
        "gap": best.gap or 0.0,
        "parameters_ratio": best.cost.parameters / parent.cost.parameters,
        "experts_ratio": best.cost.num_experts / parent.cost.num_experts,
    }
    for workload, memory in best.cost.memory_mib.items():
        speed = best.cost.throughput_tokens_per_s[workload]
        metrics[f"memory_ratio_{workload}"] = memory / parent.cost.memory_mib[workload]
        metrics[f"throughput_ratio_{workload}"] = speed / parent.cost.throughput_tokens_per_s[workload]
        metrics[f"latency_ratio_{workload}"] = best.cost.latency_ms[workload] / parent.cost.latency_ms[workload]
    damages = {f"damage_{name}": each.known_damage for name, each in candidates.items() if name != "puzzle"}
    return metrics | {name: damage for name, damage in damages.items() if damage is not None}

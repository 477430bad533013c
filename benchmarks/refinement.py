"""Does measuring whole assemblies after the search find a better child, and do learnt interactions help?

    python benchmarks/refinement.py --runs runs/refinement [--record FILE]

The tiny reasoner is scored and searched on three disjoint draws of its calibration sets, under the same limits and the
same modelled costs. Of each search four children are compared, all chosen on the draw itself:

    unrefined   the search's own choice, by the sum of its scores
    nearest     the best of 16 measured: the search's choice and the 15 that follow it by their sums
    refined     the best of 16 measured: ``refine_architecture``
    uniform     the best uniform one

Each is measured on the other draws' tokens (KL, which no choice has seen) and asked the validation problems before any
training; children are compared problem by problem, draw by draw and over all draws. Finished stages are not repeated.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bars import conclude
from tiny_children import DATA, PARENT, ask_pruned, calibration_rows

from moesaic.core.process_group import BatchShare
from moesaic.core.workbench import Workbench
from moesaic.data.sets import DataSets
from moesaic.measure.paired import Verdicts, accuracy, average, difference
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.search.library import Choice
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.refine_architecture.assemblies import run_assemblies
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.run import choose_variants
from moesaic.search.score_blocks.scoring import run_parent, total
from moesaic.search.search_architecture.run import describe, read_search
from moesaic.search.search_architecture.search import Search
from moesaic.search.solver.decomposition import Apart, minimise
from moesaic.search.space import SearchSpace
from moesaic.stages import STAGES

DRAWS, SEQUENCES, EVALUATIONS = 3, 32, 16
SPACE = SearchSpace(expert_counts=(16, 14, 12, 10, 8, 6, 4), windows=(128, 32))
SCORES = tiny_cpu().score_blocks.but(max_sequences=SEQUENCES, space=SPACE)
REFINEMENT = RefineArchitectureConfig.like(SCORES, EVALUATIONS)
ARMS = ("unrefined", "nearest", "refined", "uniform")


@dataclass(frozen=True)
class Draw:
    """One search, and the architectures of its children."""

    search: Search
    architecture: Path
    arms: Mapping[str, Architecture]
    measured: Mapping[str, float]
    """Damage on the draw itself."""


def main() -> None:
    """Search each draw, measure its children on the others, ask them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/refinement"), help="what is made (%(default)s)")
    parser.add_argument("--record", type=Path, help="where to write what was found")
    given = parser.parse_args()
    bench = Workbench(given.runs)
    ranking = bench.run(
        STAGES["rank_experts"], tiny_cpu().rank_experts, parent=PARENT, calibration_short=DATA.calibration_short
    )
    costing = tiny_cpu().measure_costs.but(source="model", hardware="h100", space=SPACE)
    costs = bench.run(STAGES["measure_costs"], costing, parent=PARENT)
    sets = [_rows(bench.directory / f"draw-{number}", [number]) for number in range(DRAWS)]
    draws = [_draw(bench, number, data, ranking, costs) for number, data in enumerate(sets)]
    held_out, solved = [], []
    for number, draw in enumerate(draws):
        others = _rows(bench.directory / f"others-{number}", [other for other in range(DRAWS) if other != number])
        held_out.append(dict(zip(ARMS, _measure(bench, draw, ranking, others, number), strict=True)))
        solved.append({arm: _ask(bench, draw, ranking, arm, number) for arm in ARMS})
    found = {
        "damage_where_chosen": [dict(draw.measured) for draw in draws],
        "damage_held_out": held_out,
        "blocks": [{arm: [block.label for block in draw.arms[arm].blocks] for arm in ARMS} for draw in draws],
        "accuracy": [
            {arm: accuracy(average(list(efforts.values()))) for arm, efforts in one.items()} for one in solved
        ],
        "refined_minus": {other: _differences(solved, other) for other in ARMS if other != "refined"},
        "problems": "validation, before any training",
    }
    conclude(" ".join(["python benchmarks/refinement.py", *sys.argv[1:]]), (), found, given.record)


def _rows(directory: Path, numbers: Sequence[int]) -> DataSets:
    """The calibration sets' rows of some draws."""
    draws = (range(number * SEQUENCES, (number + 1) * SEQUENCES) for number in numbers)
    return calibration_rows(directory, chain(*draws))


def _draw(bench: Workbench, number: int, data: DataSets, ranking: Path, costs: Path) -> Draw:
    """Score, search and refine on one draw."""
    sets = {"calibration_short": data.calibration_short, "calibration_long": data.calibration_long}
    scores = bench.run(STAGES["score_blocks"], SCORES, f"scores-{number}", parent=PARENT, ranking=ranking, **sets)
    limits = {"long": {"memory_ratio": 0.45}, "short": {"memory_ratio": 0.85}}
    config = tiny_cpu().search_architecture.but(limits=limits, random_seeds=(), frontier_points=2)
    tables = {"parent": PARENT, "scores": scores, "costs": costs}
    chosen = bench.run(STAGES["search_architecture"], config, f"architecture-{number}", **tables)
    refined = bench.run(
        STAGES["refine_architecture"],
        REFINEMENT,
        f"refined-{number}",
        **tables,
        **sets,
        ranking=ranking,
        architecture=chosen,
    )
    search = read_search(config, PARENT, scores, costs)
    content = json.loads((refined / "architecture.json").read_text())["candidates"]
    content.setdefault("unrefined", content["puzzle"])
    named = {"unrefined": "unrefined", "refined": "puzzle", "uniform": "uniform"}
    arms = {arm: _architecture(content[name]) for arm, name in named.items()}
    measured = {arm: content[name]["measured"] for arm, name in named.items()}
    nearest = _nearest(search)
    damages = _measured(bench.directory / f"nearest-{number}", search, nearest, ranking, data)
    best = min(range(len(nearest)), key=lambda index: damages[index])
    arms["nearest"], measured["nearest"] = search.library.architecture(nearest[best]), damages[best]
    return Draw(search, refined, arms, measured)


def _architecture(candidate: Mapping[str, Any]) -> Architecture:
    return Architecture.of(Block.from_config(entry) for entry in candidate["blocks"])


def _nearest(search: Search) -> list[Choice]:
    """The assemblies of least sum, in order."""
    found: list[Choice] = []
    while len(found) < EVALUATIONS:
        apart = [Apart(choice, search.library.num_layers - 1) for choice in found]
        outcome = minimise(search.library.damages, search.limits, search.effort, apart=apart)
        assert outcome is not None, "the limits leave fewer assemblies than are to be measured"
        found.append(outcome.choice)
    return found


def _measured(path: Path, search: Search, choices: Sequence[Choice], ranking: Path, data: DataSets) -> list[float]:
    """The damage of whole assemblies on a data set; kept in a file, with what was measured."""
    path.mkdir(parents=True, exist_ok=True)
    kept = path / "damages.json"
    if kept.is_file():
        saved = json.loads(kept.read_text())
        if saved["choices"] == [list(choice) for choice in choices]:
            return list(saved["damages"])
    config, checkpoint = REFINEMENT.but(max_sequences=SEQUENCES * DRAWS), Checkpoint.open(PARENT)
    variants = choose_variants(search.library.variants, checkpoint, ranking)
    probes = Probes.read(config, checkpoint, data.calibration_short, data.calibration_long, SPACE.windows, 4)
    assemblies = [tuple(options[index] for options, index in zip(variants, choice, strict=True)) for choice in choices]
    with open_parent(config, checkpoint, probes, path, BatchShare()) as parent:
        measurements = run_parent(parent, embed(config, checkpoint, parent, probes.all), probes.all, lambda _: None)
        states = embed(config, checkpoint, parent, probes.all)
        sums = run_assemblies(parent, states, measurements, assemblies, lambda _: None)
    short = len(probes.short)
    damages = [total(parts[:short])["kl"] + total(parts[short:])["kl"] for parts in sums]
    kept.write_text(json.dumps({"choices": choices, "damages": damages}))
    return damages


def _measure(bench: Workbench, draw: Draw, ranking: Path, others: DataSets, number: int) -> list[float]:
    choices = [draw.search.library.choice(draw.arms[arm]) for arm in ARMS]
    return _measured(bench.directory / f"held-out-{number}", draw.search, choices, ranking, others)


def _ask(bench: Workbench, draw: Draw, ranking: Path, arm: str, number: int) -> dict[str, Verdicts]:
    """By effort, which validation problems a child solves."""
    place = bench.directory / f"candidate-{arm}-{number}"
    place.mkdir(exist_ok=True)
    described = describe(draw.search.assembled(draw.search.library.choice(draw.arms[arm])))
    (place / "architecture.json").write_text(json.dumps({"candidates": {"puzzle": described}}))
    return ask_pruned(bench, f"{arm}-{number}", ranking, place)


def _differences(solved: Sequence[Mapping[str, Mapping[str, Verdicts]]], other: str) -> dict[str, Any]:
    """The mean over efforts, refined minus another arm: of each draw, and of all."""

    def compared(draws: Sequence[int]) -> dict[str, Any]:
        refined, rival = (
            average([verdicts for draw in draws for verdicts in solved[draw][arm].values()])
            for arm in ("refined", other)
        )
        return asdict(difference(refined, rival))

    every = range(len(solved))
    return {f"draw {draw}": compared([draw]) for draw in every} | {"all": compared(list(every))}


if __name__ == "__main__":
    main()

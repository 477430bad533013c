"""Is a child better with narrower experts on offer, at equal memory and throughput, before and after distillation?

    python benchmarks/width_recovery.py --runs runs/width_recovery [--costs DIRECTORY] [--record FILE]

On each of three disjoint draws of its calibration sets the tiny reasoner is scored and searched twice, under the demo's
limits of memory and throughput (by measured costs) and 69 % of the parameters: with fewer experts and windows on offer,
and with half the width as well. Both children are assembled, distilled alike on the same traces, and asked problems
that were drawn for this alone, before and after; they are compared problem by problem, draw by draw and over all draws.
Finished stages are not repeated. Costs are measured here, or are those of an earlier run that measured this space.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bars import Bar, conclude
from expert_width import ARMS, SPACE, of_full_width
from tiny_children import DATA, PARENT, ask, calibration_rows

from examples.tiny_reasoner import datasets
from moesaic.core.workbench import Workbench
from moesaic.measure.paired import Difference, Verdicts, accuracy, average, difference
from moesaic.models.architecture import Block
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.stages import STAGES

DRAWS, SEQUENCES, PER_FAMILY, SEED = 3, 32, 200, 106
STATES = ("pruned", "distilled")
Solved = Mapping[str, Mapping[str, Verdicts]]
"""By arm and effort."""


def main() -> None:
    """Make both children of every draw, ask them, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/width_recovery"), help="what is made (%(default)s)")
    parser.add_argument("--costs", type=Path, help="an output of measure_costs to take (measured anew)")
    parser.add_argument("--record", type=Path, help="where to write what was found")
    given = parser.parse_args()
    bench, recipe = Workbench(given.runs), tiny_cpu()
    fresh = _fresh_problems(bench.directory)
    ranking = bench.run(
        STAGES["rank_experts"], recipe.rank_experts, parent=PARENT, calibration_short=DATA.calibration_short
    )
    costing = recipe.measure_costs.but(space=SPACE)
    costs = given.costs or bench.run(STAGES["measure_costs"], costing, parent=PARENT)
    traces = bench.run(STAGES["generate_traces"], recipe.generate_traces, model=PARENT, prompts=DATA.prompts)
    chosen: list[dict[str, Any]] = []
    solved: dict[str, list[Solved]] = {state: [] for state in STATES}
    for number in range(DRAWS):
        architectures = _searched(bench, number, ranking, costs)
        children = {arm: _children(bench, number, arm, ranking, path, traces) for arm, path in architectures.items()}
        for state in STATES:
            solved[state].append(
                {arm: ask(bench, f"{_slug(arm)}-{number}-{state}", children[arm][state], tests=fresh) for arm in ARMS}
            )
        chosen.append({arm: _described(path) for arm, path in architectures.items()})
    compared = {state: _compared(draws) for state, draws in solved.items()}
    bars = [
        Bar(f"{state}, draw {number}: lower end of the mean's interval, points", one["mean"]["low_points"], least=0.0)
        for state, found in compared.items()
        for number, one in enumerate(found["draws"])
    ]
    found = {"chosen": chosen, "width_minus_none": compared, "accuracy": _accuracies(solved)}
    conclude(" ".join(["python benchmarks/width_recovery.py", *sys.argv[1:]]), bars, found, given.record)


def _fresh_problems(directory: Path) -> Path:
    """Problems that neither the test nor the validation set has."""
    directory.mkdir(parents=True, exist_ok=True)
    plan = datasets.PLAN
    others = (*datasets.test_problems(plan), *datasets.validation_problems(plan))
    taken, count = {(one.family, one.identity) for one in others}, dict.fromkeys(plan.suite.families, PER_FAMILY)
    drawn = datasets.draw_problems(random.Random(SEED), plan.suite, "test", count, taken)
    path = directory / "fresh.jsonl"
    datasets.write_rows(path, datasets.problem_rows(drawn, "fresh-"))
    return path


def _searched(bench: Workbench, number: int, ranking: Path, costs: Path) -> dict[str, Path]:
    """The architectures that both searches choose on one draw."""
    rows = range(number * SEQUENCES, (number + 1) * SEQUENCES)
    data = calibration_rows(bench.directory / f"draw-{number}", rows)
    both = bench.run(
        STAGES["score_blocks"],
        tiny_cpu().score_blocks.but(space=SPACE, max_sequences=SEQUENCES),
        f"scores-{number}",
        parent=PARENT,
        ranking=ranking,
        calibration_short=data.calibration_short,
        calibration_long=data.calibration_long,
    )
    scores = dict(
        zip(ARMS, (of_full_width(both, bench.directory / f"scores-{number}-of-full-width"), both), strict=True)
    )
    config = tiny_cpu().search_architecture.but(
        max_experts_ratio=None, max_parameters_ratio=0.69, random_seeds=(), frontier_points=2
    )
    return {
        arm: bench.run(
            STAGES["search_architecture"],
            config,
            f"{_slug(arm)}-{number}-architecture",
            parent=PARENT,
            scores=scores[arm],
            costs=costs,
        )
        for arm in ARMS
    }


def _children(
    bench: Workbench, number: int, arm: str, ranking: Path, architecture: Path, traces: Path
) -> dict[str, Path]:
    """The child before and after distillation."""
    recipe, name = tiny_cpu(), f"{_slug(arm)}-{number}"
    pruned = bench.run(
        STAGES["prune_model"],
        recipe.prune_model,
        f"{name}-child",
        parent=PARENT,
        ranking=ranking,
        architecture=architecture,
    )
    distilled = bench.run(
        STAGES["distill"],
        recipe.distill.but(seed=number),
        f"{name}-distill",
        child=pruned,
        parent=PARENT,
        traces=traces,
    )
    return dict(zip(STATES, (pruned, distilled), strict=True))


def _slug(arm: str) -> str:
    return arm.replace(" ", "-")


def _described(chosen: Path) -> dict[str, Any]:
    puzzle = json.loads((chosen / "architecture.json").read_text())["candidates"]["puzzle"]
    labels = [Block.from_config(entry).label for entry in puzzle["blocks"]]
    return {"blocks": labels, **{key: value for key, value in puzzle.items() if key != "blocks"}}


def _compared(draws: Sequence[Solved]) -> dict[str, Any]:
    """With width minus without: by effort and on average, of every draw and of all together."""
    return {
        "draws": [_of_efforts([draw]) for draw in draws],
        "all draws": _of_efforts(draws),
    }


def _of_efforts(draws: Sequence[Solved]) -> dict[str, Any]:
    """Differences of the mean over some draws: the interval counts the choice of problems, not that of draws."""
    without, with_width = ([draw[arm] for draw in draws] for arm in ARMS)

    def compare(efforts: Sequence[str]) -> Difference:
        means = [average([draw[effort] for draw in of_arm for effort in efforts]) for of_arm in (with_width, without)]
        return difference(*means)

    efforts = list(draws[0][ARMS[0]])
    return {effort: asdict(compare([effort])) for effort in efforts} | {"mean": asdict(compare(efforts))}


def _accuracies(solved: Mapping[str, Sequence[Solved]]) -> dict[str, Any]:
    return {
        state: [
            {arm: {effort: accuracy(of) for effort, of in efforts.items()} for arm, efforts in draw.items()}
            for draw in draws
        ]
        for state, draws in solved.items()
    }


if __name__ == "__main__":
    main()

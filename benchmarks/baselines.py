"""Is the search's child better than what people know, at equal cost?

    python benchmarks/baselines.py --runs runs/baselines [--demo SCORES COSTS] [--problems COUNT] [--record FILE]

The tiny reasoner is scored and searched on three disjoint draws of its calibration sets, under the demo's limits and
by costs that are measured here; or once, from what a run of the demo scored and timed. The child and the baselines, see
``search_architecture/baselines.py``, are pruned and measured before any training: KL on a draw that no score has seen,
and validation problems, on which each baseline is compared with the child problem by problem, draw by draw and over all
draws. Costs are over the parent's. Finished stages are not repeated.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bars import conclude
from tiny_children import DATA, PARENT, SEQUENCES, ask, draw_probes, draw_rows, final_states, kl, prune

from moesaic.core.workbench import Workbench
from moesaic.measure.paired import Verdicts, accuracy, average, difference
from moesaic.models.architecture import Block
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.stages import STAGES

DRAWS = 3
SCORES = tiny_cpu().score_blocks.but(max_sequences=SEQUENCES)
SEARCH = tiny_cpu().search_architecture.but(
    baselines=("uniform", "uniform_reap", "uniform_width", "uniform_memory", "uniform_throughput", "greedy"),
    random_seeds=(),
    frontier_points=2,
    num_solutions=1,
)


def main() -> None:
    """Search each draw, prune every candidate, ask it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"), help="what is made (%(default)s)")
    parser.add_argument("--record", type=Path, help="where to write what was found")
    parser.add_argument("--demo", type=Path, nargs=2, help="folders with a demo's scores and costs, in place of draws")
    parser.add_argument("--problems", type=int, default=200, help="asked per task and effort; 0: none (%(default)s)")
    given = parser.parse_args()
    bench = Workbench(given.runs)
    ranking = bench.run(
        STAGES["rank_experts"], tiny_cpu().rank_experts, parent=PARENT, calibration_short=DATA.calibration_short
    )
    if given.demo:
        found, unseen = [_search(bench, "demo", *given.demo)], [DRAWS - 1]  # it scored the first 48
    else:
        costs = bench.run(STAGES["measure_costs"], tiny_cpu().measure_costs, parent=PARENT)
        found = [_search(bench, str(draw), _score(bench, draw, ranking), costs) for draw in range(DRAWS)]
        unseen = [(draw + 1) % DRAWS for draw in range(DRAWS)]
    pruned = [{name: _prune(bench, ranking, each) for name, each in one["candidates"].items()} for one in found]
    damages = [_measure(bench.directory, *pair) for pair in zip(unseen, pruned, strict=True)]
    asked = pruned if given.problems else []
    solved = [{name: _ask(bench, path, given.problems) for name, path in one.items()} for one in asked]
    concluded = {
        "draws": [_described(*pair) for pair in zip(found, damages, strict=True)],
        "accuracy": [{name: accuracy(verdicts) for name, verdicts in one.items()} for one in solved],
        "child_minus": {name: _differences(found, solved, name) for name in SEARCH.baselines if solved},
        "problems": f"validation, {given.problems} a task and effort, before any training",
    }
    conclude(" ".join(["python benchmarks/baselines.py", *sys.argv[1:]]), (), concluded, given.record)


def _score(bench: Workbench, draw: int, ranking: Path) -> Path:
    """The scores on a draw."""
    data = draw_rows(bench.directory, draw)
    sets = {"calibration_short": data.calibration_short, "calibration_long": data.calibration_long}
    return bench.run(STAGES["score_blocks"], SCORES, f"scores-{draw}", parent=PARENT, ranking=ranking, **sets)


def _search(bench: Workbench, name: str, scores: Path, costs: Path) -> dict[str, Any]:
    """What the search found."""
    tables = {"parent": PARENT, "scores": scores, "costs": costs}
    chosen = bench.run(STAGES["search_architecture"], SEARCH, f"architecture-{name}", **tables)
    content: dict[str, Any] = json.loads((chosen / "architecture.json").read_text())
    return content


def _prune(bench: Workbench, ranking: Path, candidate: Mapping[str, Any]) -> Path:
    """A candidate's checkpoint; equal ones of several draws are one."""
    cut = json.dumps({"blocks": candidate["blocks"], "keeps": candidate["keeps"]})
    name = hashlib.sha256(cut.encode()).hexdigest()[:12]
    place = bench.directory / f"candidate-{name}"
    place.mkdir(exist_ok=True)
    path = place / "architecture.json"
    if not path.is_file():
        path.write_text(json.dumps({"candidates": {"puzzle": json.loads(cut)}}))
    return prune(bench, name, ranking, place)


def _measure(directory: Path, draw: int, pruned: Mapping[str, Path]) -> dict[str, float]:
    """By name the KL on a draw."""
    probes = draw_probes(directory, draw)
    references = final_states(PARENT, probes)
    return {name: kl(child, probes, references) for name, child in pruned.items()}


def _ask(bench: Workbench, child: Path, problems: int) -> Verdicts:
    """Which validation problems a child solves, the mean over efforts."""
    return average(list(ask(bench, child.name, child, problems).values()))


def _described(found: Mapping[str, Any], damages: Mapping[str, float]) -> dict[str, Any]:
    """By name what a candidate is, what it costs, and its KL."""
    parent = found["parent"]
    rows = {
        name: {
            "blocks": [Block.from_config(entry).label for entry in candidate["blocks"]],
            "damage": candidate["damage"],
            "breaks": candidate["breaks"],
            "parameters": candidate["parameters"] / parent["parameters"],
            **{
                cost: {workload: figure / parent[cost][workload] for workload, figure in candidate[cost].items()}
                for cost in ("memory_mib", "throughput_tokens_per_s")
            },
            "kl_held_out": damages[name],
        }
        for name, candidate in found["candidates"].items()
    }
    return rows | {"left out": found["skipped"]}


def _differences(found: Sequence[Mapping[str, Any]], solved: Sequence[Mapping[str, Verdicts]], name: str) -> Any:
    """The child minus a baseline, or minus the one that it equals: of each draw that has it, and of all these."""
    pairs = {}
    for draw, (content, verdicts) in enumerate(zip(found, solved, strict=True)):
        same = content["skipped"].get(name, "").removeprefix("the same assembly as ")
        if (rival := verdicts.get(name) or verdicts.get(same)) is not None:
            pairs[draw] = verdicts["puzzle"], rival
    if not pairs:
        return None
    every = (average(list(one)) for one in zip(*pairs.values(), strict=True))
    return {f"draw {draw}": asdict(difference(*pair)) for draw, pair in pairs.items()} | {
        "all": asdict(difference(*every))
    }


if __name__ == "__main__":
    main()

"""Does scoring every sequence alike, rather than every token, find a child that is better at low effort?

    python benchmarks/score_balance.py --runs runs/balance [--record FILE]

The tiny reasoner's blocks are scored with both balances on two disjoint halves of its calibration sets; each of the
four score tables is solved under the same limits, with the same modelled costs, and its child assembled and asked the
validation problems, before any training. The space is small, to keep it short. Children are compared problem by
problem, ``trace`` minus ``token``; intervals count the choice of problems, not that of calibration rows, for which
there are the two halves.
``between_balances`` is the rank correlation of the damages of one half, ``between_halves`` that of one balance: the
second says how much of the first is noise. Finished stages are not repeated.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from bars import conclude
from scipy.stats import spearmanr
from tiny_children import DATA, PARENT, ask_pruned, calibration_rows

from moesaic.core.config import Balance
from moesaic.core.workbench import Workbench
from moesaic.data.calibration import load_batches
from moesaic.data.sets import DataSets
from moesaic.measure.paired import Verdicts, average, difference
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.search.space import SearchSpace
from moesaic.stages import STAGES

SEQUENCES = 48
"""Of each calibration set, in each half."""
SPACE = SearchSpace(expert_counts=(16, 12, 8, 4), windows=(128, 32))
BALANCES: tuple[Balance, ...] = get_args(Balance)


def main() -> None:
    """Score, search, prune, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/balance"), help="what is made (%(default)s)")
    parser.add_argument("--record", type=Path, help="where to write what was found")
    given = parser.parse_args()
    bench = Workbench(given.runs)
    halves = [_half(bench.directory / f"half-{number}", number) for number in range(2)]
    ranking = bench.run(
        STAGES["rank_experts"], tiny_cpu().rank_experts, parent=PARENT, calibration_short=DATA.calibration_short
    )
    made = {
        (balance, number): _child(bench, balance, number, half, ranking)
        for number, half in enumerate(halves)
        for balance in BALANCES
    }
    found = {
        "share_of_measured_tokens_at_low_effort": _low_share(halves),
        "rank_correlation": _correlations({key: scores for key, (scores, _) in made.items()}),
        "blocks": {f"{balance}, half {half}": _blocks(bench, balance, half) for balance, half in made},
        "trace_minus_token": _differences({key: solved for key, (_, solved) in made.items()}),
        "accuracy": {
            f"{balance}, half {half}": {effort: fmean(_shares(solved)) for effort, solved in efforts.items()}
            for (balance, half), (_, efforts) in made.items()
        },
        "problems": "validation, before any training",
    }
    conclude(" ".join(["python benchmarks/score_balance.py", *sys.argv[1:]]), (), found, given.record)


def _half(directory: Path, number: int) -> DataSets:
    """The calibration sets' rows of one half."""
    return calibration_rows(directory, range(number * SEQUENCES, (number + 1) * SEQUENCES))


def _child(
    bench: Workbench, balance: Balance, half: int, data: DataSets, ranking: Path
) -> tuple[list[float], dict[str, Verdicts]]:
    """The damages of one score table, and by effort which validation problems its child solves."""
    recipe, name = tiny_cpu(), f"{balance}-{half}"
    scores = bench.run(
        STAGES["score_blocks"],
        recipe.score_blocks.but(balance=balance, max_sequences=SEQUENCES, space=SPACE),
        f"scores-{name}",
        parent=PARENT,
        ranking=ranking,
        calibration_short=data.calibration_short,
        calibration_long=data.calibration_long,
    )
    costs = bench.run(
        STAGES["measure_costs"],
        recipe.measure_costs.but(source="model", hardware="h100", space=SPACE),
        "costs",
        parent=PARENT,
    )
    limits = {"long": {"memory_ratio": 0.45}, "short": {"memory_ratio": 0.85}}
    architecture = bench.run(
        STAGES["search_architecture"],
        recipe.search_architecture.but(limits=limits, random_seeds=(), frontier_points=2),
        f"architecture-{name}",
        parent=PARENT,
        scores=scores,
        costs=costs,
    )
    damages = [row["damage"] for row in json.loads((scores / "scores.json").read_text())["rows"]]
    return damages, ask_pruned(bench, name, ranking, architecture)


def _low_share(halves: Sequence[DataSets]) -> float:
    """Response tokens of conversations at low effort, of all in the short sets."""
    counts = {"low": 0, "other": 0}
    for half in halves:
        rows = half.calibration_short.read_text().splitlines(keepends=True)
        for which in counts:
            chosen = [row for row in rows if (json.loads(row)["effort"] == "low") == (which == "low")]
            path = half.calibration_short.with_name(f"{which}.jsonl")
            path.write_text("".join(chosen))
            batches = load_batches(path, PARENT, max_sequences=SEQUENCES, max_tokens=1024, batch_tokens=8192)
            counts[which] += sum(int(batch.is_response.sum()) for batch in batches)
    return counts["low"] / sum(counts.values())


def _correlations(damages: dict[tuple[Balance, int], list[float]]) -> dict[str, dict[str, float]]:
    """Spearman's, over the rows of two score tables."""

    def correlation(one: tuple[Balance, int], other: tuple[Balance, int]) -> float:
        return float(spearmanr(damages[one], damages[other]).statistic)

    return {
        "between_balances": {f"half {half}": correlation(("token", half), ("trace", half)) for half in range(2)},
        "between_halves": {balance: correlation((balance, 0), (balance, 1)) for balance in BALANCES},
    }


def _blocks(bench: Workbench, balance: Balance, half: int) -> list[str]:
    """Experts and window of every layer of the child."""
    content = json.loads((bench.directory / f"architecture-{balance}-{half}" / "architecture.json").read_text())
    blocks = content["candidates"]["puzzle"]["blocks"]
    return [json.dumps(list(block.values())) for block in blocks]


def _differences(solved: dict[tuple[Balance, int], dict[str, Verdicts]]) -> dict[str, dict[str, Any]]:
    """By effort, and of the mean over them; of each half's pair of children, and of the mean of both."""
    efforts = list(solved["trace", 0])
    groups = {**{effort: [effort] for effort in efforts}, "mean": efforts}

    def compared(group: Sequence[str], halves: Sequence[int]) -> dict[str, Any]:
        trace, token = (
            average([solved[balance, half][effort] for half in halves for effort in group])
            for balance in ("trace", "token")
        )
        return asdict(difference(trace, token))

    pairs = {"half 0": [0], "half 1": [1], "both": [0, 1]}
    return {name: {where: compared(group, halves) for where, halves in pairs.items()} for name, group in groups.items()}


def _shares(solved: Verdicts) -> list[float]:
    return [fmean(of_task.values()) for of_task in solved.values()]


if __name__ == "__main__":
    main()

"""What a price on length does to a policy, by whether advantages are divided by the spread of a prompt's rewards.

    python benchmarks/length_price.py --runs runs/experiment [--record FILE]

GRPO divides a prompt's advantages by the standard deviation of its rewards. Where all replies are right, only the
price on their length differs, and divided so it weighs as much as an answer, however small it is. Asked is what that
does to the policy of low effort of ``reasoner_cpu``: the distilled children of ``experiment.py`` (puzzle, one per seed)
sometimes write a step at low effort, which is right more often and longer. Validation problems choose, of low effort.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from bars import conclude
from experiment import DATA, EXAMPLE, Asked, Made, Replies

from moesaic.core.config import Effort
from moesaic.core.workbench import Workbench
from moesaic.measure.paired import accuracy, average, difference
from moesaic.pipelines.recipes import reasoner_cpu
from moesaic.recover.reinforce.stage import RewardConfig
from moesaic.stages import STAGES

KINDS = {
    "scaled, 0.2": (True, 0.2),
    "scaled, 0.05": (True, 0.05),
    "scaled, no price": (True, 0.0),
    "not scaled, 0.2": (False, 0.2),
}
"""Whether advantages are scaled, and the price."""
BEFORE = "distilled"
EFFORT: Effort = "low"


def main() -> None:
    """Train every kind with every seed, and compare with where it began."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/experiment"), help="of experiment.py (%(default)s)")
    parser.add_argument("--problems", type=int, default=60, help="asked per family (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", type=Path, help="where to write what was found")
    given = parser.parse_args()
    tests = (EXAMPLE / "data" / "validation.jsonl").absolute()
    asked = Asked(tests, "validation", given.problems, (BEFORE, *KINDS), (EFFORT,))
    tasks = [(seed, kind) for seed in given.seeds for kind in (BEFORE, *KINDS)]
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        replies = dict(zip(tasks, pool.map(partial(reply, given.runs, asked), *zip(*tasks, strict=True)), strict=True))
    found = {
        "seeds": given.seeds,
        "problems": f"validation, {given.problems} a family, {EFFORT} effort",
        "over_distilled": {
            kind: compare({seed: (replies[seed, kind], replies[seed, BEFORE]) for seed in given.seeds})
            for kind in KINDS
        },
    }
    conclude(f"python benchmarks/length_price.py --problems {given.problems}", (), found, given.record)


def reply(directory: Path, asked: Asked, seed: int, kind: str) -> Replies:
    """How a child answers after a policy of this kind, or before any."""
    bench = Workbench(directory)
    model, name = bench.directory / f"puzzle-{seed}-distilled", f"puzzle-{seed}-{kind}"
    if kind != BEFORE:
        scaled, price = KINDS[kind]
        policy = reasoner_cpu().seeded(seed).policies[1]
        policy = policy.but(scale_rewards=scaled, rewards=RewardConfig(length=price))
        traces = bench.directory / "generate_traces"
        model = bench.run(STAGES["reinforce"], policy, name, model=model, prompts=DATA.prompts, traces=traces)
    return asked.ask(bench, {kind: Made(name, model)})[kind]


def compare(by_seed: Mapping[int, tuple[Replies, Replies]]) -> dict[str, Any]:
    """After minus before, of every seed and over the mean of them; and what a request took."""
    after, before = zip(*by_seed.values(), strict=True)
    solved = [[each[EFFORT]["solved"] for each in seeds] for seeds in (after, before)]
    return {
        "mean": asdict(difference(*(average(each) for each in solved))),
        "by_seed": [asdict(difference(*each)) for each in zip(*solved, strict=True)],
        "accuracy": [100 * fmean(map(accuracy, each)) for each in solved],
        "tokens_per_request": [fmean(each[EFFORT]["tokens"] for each in seeds) for seeds in (after, before)],
    }


if __name__ == "__main__":
    main()

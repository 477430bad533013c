"""Accuracy against requests per second through vLLM, at every effort (paper A, figure 1), for several checkpoints.

    python benchmarks/served_frontier.py --models parent=MODEL child=MODEL ... --tests FILE [--record F] [--figure F]

Each model gets a server of its own, in turns, ``--turns`` times. At each effort all problems are asked, ``--users``
requests in flight, after as many that are not counted; a rate is the number of replies over the time until the last of
them. So replies have the lengths that the model gives them, and accuracy is of the very replies that were timed. Every
turn draws other replies to the same problems. Nothing else should run meanwhile.

What is named first is what the others are compared with: in accuracy with an interval over problems, in requests per
second turn by turn.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bars import conclude
from matplotlib.figure import Figure

from moesaic.core.config import Effort
from moesaic.core.progress import say
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Problem, first_of_each_task, read_problems, render_prompt
from moesaic.deploy.engines import Server, ServerSpec, started_server
from moesaic.deploy.engines.completions import Completion, RequestSettings, complete
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.measure.benchmark_serving.load_sweep import Spread
from moesaic.measure.efficiency import Deployment, FrontierPoint, gain_at_accuracy, pareto_frontier
from moesaic.measure.evaluate.run import judge, summarize
from moesaic.measure.paired import Verdicts, accuracy, average, difference
from moesaic.measure.report.drawing import (
    CHILD,
    MARKERS,
    OTHER,
    PARENT,
    new_figure,
    rival_colour,
    scale_request_rates,
    tidy,
    to_png,
)
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import read_stop_ids, seed_of
from moesaic.pipelines.recipes import reasoner_cpu

EVALUATE = reasoner_cpu().evaluate
"""How problems are asked."""


@dataclass(frozen=True)
class Asked:
    """All problems, asked once at one effort."""

    solved: Verdicts
    tokens: float
    """Per request, generated."""
    requests_per_s: float


@dataclass(frozen=True)
class Load:
    """What is sent to a server."""

    problems: Sequence[Problem]
    users: int

    def ask(self, server: Server, model: Path, effort: Effort, turn: int) -> Asked:
        """Ask all problems; the time is that of the replies, without reading them."""
        tokenizer, settings = load_tokenizer(model), RequestSettings(read_stop_ids(model), self.users, 600.0)
        wanted = [
            Completion(
                problem.id,
                tuple(render_prompt(problem, tokenizer, effort)),
                EVALUATE.max_new_tokens,
                EVALUATE.temperature,
                seed_of("served_frontier", turn, effort, problem.id),
            )
            for problem in self.problems
        ]
        for _ in complete(server, wanted[: self.users], settings):
            pass
        begun = time.monotonic()
        replies = dict(complete(server, wanted, settings))
        seconds = time.monotonic() - begun
        told = summarize([judge(problem, replies[n], tokenizer, effort) for n, problem in enumerate(self.problems)])
        verdicts = {task: entry["solved"] for task, entry in told["tasks"].items()}
        say(f"{effort}: {100 * told['accuracy']:.1f}% in {told['tokens_per_request']:.1f} tokens, {seconds:.0f} s")
        return Asked(verdicts, told["tokens_per_request"], len(wanted) / seconds)


Turns = Mapping[str, Mapping[Effort, Sequence[Asked]]]
"""By model and effort: what every turn found."""


def main() -> None:
    """Serve every model in turns, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=40, help="asked per family and effort (%(default)s)")
    parser.add_argument("--users", type=int, default=16, help="requests in flight (%(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    models = {name: Path(path) for name, _, path in (entry.partition("=") for entry in given.models)}
    load = Load(first_of_each_task(read_problems(given.tests), given.problems), given.users)
    turns: dict[str, dict[Effort, list[Asked]]] = {name: {effort: [] for effort in EVALUATE.efforts} for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.turns):
            for name, model in list(models.items())[:: -1 if turn % 2 else 1]:
                say(f"turn {turn + 1} of {given.turns}: {name}")
                for effort, asked in serve(model, Path(folder) / name, load, turn).items():
                    turns[name][effort].append(asked)
    points = frontier(turns)
    found = {
        "problems": len(load.problems),
        "users": given.users,
        "turns": given.turns,
        "models": {name: {effort: described(asked) for effort, asked in told.items()} for name, told in turns.items()},
        "against_first": against_first(turns),
        "frontier": [f"{one.deployment.model}, {one.deployment.effort}" for one in pareto_frontier(points)],
        "rate_where_no_less_accurate": gains(points),
    }
    conclude(" ".join(["python benchmarks/served_frontier.py", *sys.argv[1:]]), (), found, given.record)
    if given.figure:
        given.figure.write_bytes(to_png(draw(found, points)))


def serve(model: Path, place: Path, load: Load, turn: int) -> dict[Effort, Asked]:
    """What a fresh server of this model gives, effort by effort."""
    place.mkdir(exist_ok=True)
    bundle = place / "bundle"
    if not bundle.is_dir():
        write_bundle(Checkpoint.open(model), bundle, reasoner_cpu().export_engine.but(max_batch_size=load.users))
    tokens = load.users * Checkpoint.open(model).shape.max_positions
    spec = ServerSpec("model", bundle.absolute(), "bf16", "float32", load.users, tokens)
    with started_server("vllm", spec, place / f"server-{turn}.log", EVALUATE.startup_timeout_s) as server:
        return {effort: load.ask(server, model, effort, turn) for effort in EVALUATE.efforts}


def described(asked: Sequence[Asked]) -> dict[str, Any]:
    """One model at one effort, over all turns."""
    return {
        "accuracy": 100 * accuracy(solved(asked)),
        "tokens_per_request": fmean(one.tokens for one in asked),
        "requests_per_s": asdict(Spread.of(one.requests_per_s for one in asked)),
    }


def against_first(turns: Turns) -> dict[str, Any]:
    """Every other model against the first, at equal effort."""
    (_, first), *others = turns.items()
    return {name: {effort: compare(told[effort], first[effort]) for effort in told} for name, told in others}


def compare(model: Sequence[Asked], other: Sequence[Asked]) -> dict[str, Any]:
    """Points of accuracy over all turns, and the ratio of rates turn by turn."""
    ratios = [ours.requests_per_s / theirs.requests_per_s for ours, theirs in zip(model, other, strict=True)]
    return {"accuracy": asdict(difference(solved(model), solved(other))), "requests_per_s": asdict(Spread.of(ratios))}


def solved(turns: Sequence[Asked]) -> Verdicts:
    """The share of correct replies to each problem."""
    return average([asked.solved for asked in turns])


def frontier(turns: Turns) -> list[FrontierPoint]:
    """Every model at every effort; rates are over the first model's at its highest effort."""
    rates = {
        Deployment(name, effort): Spread.of(one.requests_per_s for one in asked).median
        for name, told in turns.items()
        for effort, asked in told.items()
    }
    reference = rates[Deployment(next(iter(turns)), EVALUATE.efforts[-1])]
    return [
        FrontierPoint(where, rate, rate / reference, accuracy(solved(turns[where.model][where.effort])))
        for where, rate in rates.items()
    ]


def gains(points: Sequence[FrontierPoint]) -> dict[str, Any]:
    """For every point of the first model: of each other model the fastest that is no less accurate, over its rate."""
    first = points[0].deployment.model
    names = [name for name in dict.fromkeys(point.deployment.model for point in points) if name != first]
    return {
        name: {
            goal.deployment.effort: gain_at_accuracy([p for p in points if p.deployment.model == name], goal)
            for goal in points
            if goal.deployment.model == first
        }
        for name in names
    }


def draw(found: Mapping[str, Any], points: Sequence[FrontierPoint]) -> Figure:
    """A line per model through its efforts; bars reach from the slowest to the fastest turn."""
    figure = new_figure(7.6, 4.8)
    axes = figure.subplots()
    first, *others = found["models"]
    colours = {first: PARENT} | {name: CHILD if place == 0 else rival_colour(name) for place, name in enumerate(others)}
    reference = points[0].requests_per_s / points[0].relative_rate
    for name, told in found["models"].items():
        line, colour = [point for point in points if point.deployment.model == name], colours[name]
        axes.plot([p.relative_rate for p in line], [100 * p.accuracy for p in line], color=colour, linewidth=1.6)
        axes.plot([], [], color=colour, label=name.replace("_", " "))
        for point in line:
            effort, height = point.deployment.effort, 100 * point.accuracy
            spread = told[effort]["requests_per_s"]
            axes.plot([spread["min"] / reference, spread["max"] / reference], [height] * 2, color=colour)
            axes.plot(point.relative_rate, height, MARKERS[effort], color=colour, markersize=8)
    for name, marker in MARKERS.items():
        axes.plot([], [], marker, color=OTHER, label=f"{name} effort")
    axes.legend(loc="lower left")
    tidy(axes)
    axes.margins(x=0.1, y=0.12)
    scale_request_rates(axes, [point.relative_rate for point in points], EVALUATE.efforts[-1])
    axes.set_ylabel("accuracy, mean over families [%]")
    return figure


if __name__ == "__main__":
    main()

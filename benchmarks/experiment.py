r"""Which part of the method gives what: every arm of the experiment with the same recovery, on the reasoner.

    python -m examples.reasoner.datasets --published 100 --out runs/experiment
    python benchmarks/experiment.py --runs runs/experiment --tests runs/experiment/published.jsonl [--record FILE]

Arms, all under the limits of the recipe ``reasoner_cpu`` and by costs that are measured here:

    puzzle              the search's choice by experts and windows
    refined             the same after whole assemblies are measured
    axes                the search's choice with fewer and narrower experts per token on offer too
    uniform_*, greedy, random-0    see ``search_architecture/baselines.py``
    parent              nothing is pruned or distilled: it gets the reinforcement alone

Every arm is pruned, distilled, reinforced by each policy, averaged and given an FP8 cache, once per seed. A seed draws
the order of the data and the rollouts anew; the search is the same. Replies are sampled at temperature 1, as gpt-oss is
asked. Differences are paired problem by problem, over the mean of the seeds that both have; their intervals are over
problems, and each seed's own points stand beside them.

The reasoner's keys and values fit FP8 as they are. So that calibration has something to do, the first seed's child is
also asked with its keys times 4096 and its queries divided by it: the same model to the last bit, in another range.

Choices (steps, rates, rewards, efforts) were made on the validation problems: ``--tests
examples/reasoner/data/validation.jsonl --split validation``. Finished stages are not repeated, and a few models can be
asked much more afterwards:

    python -m examples.reasoner.datasets --published 1000 --out runs/many
    python benchmarks/experiment.py --runs runs/experiment --tests runs/many/published.jsonl --problems 1000 \
        --arms puzzle uniform --stages parent averaged [--record FILE]
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from bars import conclude
from scipy.stats import ttest_1samp

from moesaic.core.config import Efforts, EmulatedCache
from moesaic.core.workbench import Workbench
from moesaic.data.sets import DataSets
from moesaic.measure.paired import Verdicts, accuracy, average, difference
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.pipelines.recipes import reasoner_cpu
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.stages import STAGES

EXAMPLE = Path("examples/reasoner")
PARENT, DATA = EXAMPLE / "parent", DataSets.at(EXAMPLE / "data")
ARMS = {
    "puzzle": "architecture",
    "uniform": "architecture",
    "refined": "refined",
    "axes": "architecture-axes",
    "uniform_memory": "architecture",
    "uniform_throughput": "architecture",
    "uniform_reap": "architecture",
    "greedy": "architecture",
    "random-0": "architecture",
}
"""Where an arm's assembly stands; it is the candidate of the same name, or ``puzzle``."""
ALL_STAGES = ["parent", "pruned", "distilled", "policy high", "policy low", "averaged", "fp8_unit", "fp8"]
"""After which an arm may be asked."""
EVALUATIONS = 16
"""Assemblies that ``refined`` measures."""
AXES = {"experts_per_token": (2,), "expert_widths": (32,)}
"""What ``axes`` has on offer beside counts and windows."""
SHARPENED = 4096.0
"""A power of two, so that nothing is rounded."""

Replies = Mapping[str, Mapping[str, Any]]
"""By effort: which problems were solved, and how many tokens a request took."""


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the cache that it is asked with."""

    name: str
    model: Path
    kv_cache: EmulatedCache = "bf16"


@dataclass(frozen=True)
class Asked:
    """The problems of all evaluations, and after which stages they are asked."""

    tests: Path
    split: str
    problems_per_task: int
    stages: Sequence[str]
    efforts: Efforts = ("low", "medium", "high")

    def ask(self, bench: Workbench, made: Mapping[str, Made]) -> dict[str, Replies]:
        """How checkpoints answer, by stage."""
        return {stage: self._ask(bench, each) for stage, each in made.items() if stage in self.stages}

    def _ask(self, bench: Workbench, made: Made) -> Replies:
        config = reasoner_cpu().evaluate.but(
            split=self.split,
            efforts=self.efforts,
            problems_per_task=self.problems_per_task,
            kv_cache=made.kv_cache,
        )
        task = f"evaluation-{self.tests.stem}-{self.problems_per_task}-{made.name}"
        path = bench.run(STAGES["evaluate"], config, task, model=made.model, tests=self.tests)
        return {
            effort: {
                "solved": {task: entry["solved"] for task, entry in result["tasks"].items()},
                "tokens": result["tokens_per_request"],
            }
            for effort, result in json.loads((path / "evaluation.json").read_text())["efforts"].items()
        }


def main() -> None:
    """Search, recover every arm, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/experiment"), help="what is made (%(default)s)")
    parser.add_argument("--tests", type=Path, required=True, help="problems of every evaluation")
    parser.add_argument("--split", default="test", help="what they are for: test, validation (%(default)s)")
    parser.add_argument("--problems", type=int, default=100, help="asked per family and effort (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "parent"], choices=[*ARMS, "parent"])
    parser.add_argument("--stages", nargs="+", default=ALL_STAGES, choices=ALL_STAGES, help="asked (default: all)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", type=Path, help="where to write what was found")
    given = parser.parse_args()
    asked = Asked(given.tests.absolute(), given.split, given.problems, given.stages)
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        tables = _search(given.runs, pool, given.arms)
        candidates = {arm: _candidate(tables, arm) for arm in given.arms if arm != "parent"}
        left_out = {arm: _skipped(tables, arm) for arm, candidate in candidates.items() if not candidate}
        arms = [arm for arm, candidate in candidates.items() if candidate]
        everyone = [*arms, "parent"]
        list(pool.map(partial(_prune, given.runs, tables), arms))
        begun = pool.map(partial(_begin, given.runs, asked, tables), everyone)
        recover = partial(_recover, given.runs, asked, tables)
        tasks = [(arm, seed) for seed in given.seeds for arm in everyone if arm in given.arms]
        recovered = pool.map(recover, *zip(*tasks, strict=True))
        first = dict(zip(everyone, begun, strict=True))
        replies = dict(zip(tasks, recovered, strict=True))
    found: dict[str, dict[str, list[Replies]]] = {arm: {} for arm in everyone}
    for arm, stages in found.items():
        for seed in given.seeds:
            for stage, told in (first[arm] | replies.get((arm, seed), {})).items():
                stages.setdefault(stage, []).append(told)
    if "puzzle" in arms and "fp8" in asked.stages:
        found["sharpened"] = {stage: [each] for stage, each in _sharpen(given.runs, asked, given.seeds[0]).items()}
    concluded = {
        "seeds": given.seeds,
        "problems": f"{given.split}, {given.problems} a family and effort",
        "arms": {
            arm: _described(_content(tables, arm)["parent"], candidate)
            for arm, candidate in candidates.items()
            if candidate
        },
        "left_out": left_out,
        "accuracy": _by_stage(found, lambda replies: 100 * accuracy(replies["solved"])),
        "tokens_per_request": _by_stage(found, lambda replies: replies["tokens"]),
        "differences": (differences := _differences(found, arms)),
        "over_all_runs": {
            pair: _over_runs([differences.get(f"{arm}, {pair}", {}) for arm in arms])
            for pair in (
                "policy high - distilled",
                "policy low - distilled",
                "averaged - distilled",
                "fp8_unit - averaged",
                "fp8 - averaged",
                "fp8 - fp8_unit",
            )
        },
    }
    conclude("python benchmarks/experiment.py " + shlex.join(sys.argv[1:]), (), concluded, given.record)


def _search(directory: Path, pool: ProcessPoolExecutor, arms: Sequence[str]) -> dict[str, Path]:
    """Rank, measure costs alone, score both spaces, search them; the traces meanwhile."""
    bench, recipe = Workbench(directory), reasoner_cpu()
    short = DATA.calibration_short
    ranking = bench.run(STAGES["rank_experts"], recipe.rank_experts, parent=PARENT, calibration_short=short)
    spaces = {"": recipe.score_blocks.space}
    if "axes" in arms:
        spaces["-axes"] = recipe.score_blocks.space.but(**AXES)
    costs = {
        name: bench.run(STAGES["measure_costs"], recipe.measure_costs.but(space=space), f"costs{name}", parent=PARENT)
        for name, space in spaces.items()
    }
    traces = pool.submit(_traces, directory)
    scoring = {name: pool.submit(_score, directory, name, space) for name, space in spaces.items()}
    tables = {"ranking": ranking, "traces": traces.result()}
    for name, scored in scoring.items():
        tables[f"architecture{name}"] = bench.run(
            STAGES["search_architecture"],
            recipe.search_architecture.but(frontier_points=2, num_solutions=1),
            f"architecture{name}",
            parent=PARENT,
            scores=scored.result(),
            costs=costs[name],
        )
    if "refined" in arms:
        tables["refined"] = bench.run(
            STAGES["refine_architecture"],
            recipe.refine_architecture.but(evaluations=EVALUATIONS),
            "refined",
            parent=PARENT,
            ranking=ranking,
            scores=scoring[""].result(),
            costs=costs[""],
            architecture=tables["architecture"],
            calibration_short=short,
            calibration_long=DATA.calibration_long,
        )
    return tables


def _traces(directory: Path) -> Path:
    """The parent's replies, which every arm is distilled on."""
    config = reasoner_cpu().generate_traces
    return Workbench(directory).run(STAGES["generate_traces"], config, model=PARENT, prompts=DATA.prompts)


def _score(directory: Path, name: str, space: Any) -> Path:
    """The scores of a space."""
    sets = {"calibration_short": DATA.calibration_short, "calibration_long": DATA.calibration_long}
    config = reasoner_cpu().score_blocks.but(space=space)
    ranking = directory.absolute() / "rank_experts"
    return Workbench(directory).run(
        STAGES["score_blocks"], config, f"scores{name}", parent=PARENT, ranking=ranking, **sets
    )


def _content(tables: Mapping[str, Path], arm: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tables[ARMS[arm]] / "architecture.json").read_text())
    return content


def _name(arm: str) -> str:
    """What an arm's assembly is called where it stands."""
    return arm if ARMS[arm] == "architecture" else "puzzle"


def _candidate(tables: Mapping[str, Path], arm: str) -> dict[str, Any] | None:
    """An arm's assembly, or None where the search made none."""
    candidates: dict[str, dict[str, Any]] = _content(tables, arm)["candidates"]
    return candidates.get(_name(arm))


def _skipped(tables: Mapping[str, Path], arm: str) -> str:
    return str(_content(tables, arm)["skipped"].get(arm, "not made"))


def _begin(directory: Path, asked: Asked, tables: Mapping[str, Path], arm: str) -> dict[str, Replies]:
    """How an arm answers before anything is trained."""
    bench = Workbench(directory)
    if arm == "parent":
        return asked.ask(bench, {"parent": Made("parent", PARENT)})
    name = f"{arm}-pruned"
    return asked.ask(bench, {"pruned": Made(name, _pruned(bench, tables, arm))})


def _prune(directory: Path, tables: Mapping[str, Path], arm: str) -> None:
    """Once, before several processes ask for it."""
    _pruned(Workbench(directory), tables, arm)


def _pruned(bench: Workbench, tables: Mapping[str, Path], arm: str) -> Path:
    """An arm's checkpoint before anything is trained."""
    config = PruneModelConfig(candidate=_name(arm))
    made_of = {"parent": PARENT, "ranking": tables["ranking"], "architecture": tables[ARMS[arm]]}
    return bench.run(STAGES["prune_model"], config, f"{arm}-pruned", **made_of)


def _recover(directory: Path, asked: Asked, tables: Mapping[str, Path], arm: str, seed: int) -> dict[str, Replies]:
    """Everything that one arm gets with one seed, by stage how it answers."""
    bench, recipe = Workbench(directory), reasoner_cpu().seeded(seed)
    model, made = PARENT, {}
    if arm != "parent":
        given = {"child": _pruned(bench, tables, arm), "parent": PARENT, "traces": tables["traces"]}
        name = f"{arm}-{seed}-distilled"
        model = bench.run(STAGES["distill"], recipe.distill, name, **given)
        made["distilled"] = Made(name, model)
    policies = []
    for policy in recipe.policies:
        name = f"{arm}-{seed}-{policy.name}"
        policies.append(
            bench.run(STAGES["reinforce"], policy, name, model=model, prompts=DATA.prompts, traces=tables["traces"])
        )
        made[f"policy {policy.name}"] = Made(name, policies[-1])
    name = f"{arm}-{seed}-averaged"
    averaged = bench.run(STAGES["average_checkpoints"], recipe.average_checkpoints, name, policies=policies)
    made["averaged"] = Made(name, averaged)
    return asked.ask(bench, made | _with_fp8(bench, f"{arm}-{seed}", averaged))


def _with_fp8(bench: Workbench, name: str, model: Path) -> dict[str, Made]:
    """A model with its cache rounded to FP8, as it is and by calibrated scales."""
    config = reasoner_cpu().calibrate_kv
    calibrated = bench.run(
        STAGES["calibrate_kv"], config, f"{name}-calibrated", model=model, calibration=DATA.calibration_short
    )
    return {
        "fp8_unit": Made(f"{name}-fp8_unit", calibrated, "fp8_unit"),
        "fp8": Made(f"{name}-fp8", calibrated, "fp8"),
    }


def _sharpen(directory: Path, asked: Asked, seed: int) -> dict[str, Replies]:
    """The same child with its keys in a range that FP8 does not have."""
    bench = Workbench(directory)
    source = Checkpoint.open(bench.directory / f"puzzle-{seed}-averaged")
    place = bench.directory / f"puzzle-{seed}-sharpened"
    if not place.is_dir() or place.stat().st_mtime < source.directory.stat().st_mtime:
        shutil.rmtree(place, ignore_errors=True)
        replaced = {
            f"model.layers.{layer}.self_attn.{part}_proj.{kind}": factor
            for layer in range(source.num_layers)
            for part, factor in (("k", SHARPENED), ("q", 1 / SHARPENED))
            for kind in ("weight", "bias")
        }
        tensors = {name: source.tensor(name) * factor for name, factor in replaced.items()}
        rewrite_checkpoint(source, place, tensors, {"keys": SHARPENED})
    name = f"puzzle-{seed}-sharpened"
    return asked.ask(bench, {"averaged": Made(name, place)} | _with_fp8(bench, name, place))


def _described(parent: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """What an assembly is, and its costs over the parent's."""
    return {
        "blocks": [Block.from_config(entry).label for entry in candidate["blocks"]],
        "damage": candidate["damage"],
        "parameters": candidate["parameters"] / parent["parameters"],
        **{
            cost: {workload: figure / parent[cost][workload] for workload, figure in candidate[cost].items()}
            for cost in ("memory_mib", "throughput_tokens_per_s")
        },
    }


def _by_stage(
    found: Mapping[str, Mapping[str, Sequence[Replies]]], figure: Callable[[Mapping[str, Any]], float]
) -> dict[str, Any]:
    """A figure of every arm after every stage: by effort the mean of the seeds."""
    return {
        arm: {
            stage: {effort: fmean(figure(one[effort]) for one in seeds) for effort in seeds[0]}
            for stage, seeds in stages.items()
        }
        for arm, stages in found.items()
    }


def _differences(found: Mapping[str, Mapping[str, Sequence[Replies]]], arms: Sequence[str]) -> dict[str, Any]:
    """Every claim as one model minus another."""
    told: dict[str, Any] = {}

    def tell(arm: str, stage: str, other: str, other_stage: str) -> None:
        if stage in found.get(arm, ()) and other_stage in found.get(other, ()):
            name = f"{arm}, {stage} - {other + ', ' if other != arm else ''}{other_stage}"
            told[name] = _compare(found[arm][stage], found[other][other_stage])

    for arm in found:
        for before, after in (
            ("pruned", "distilled"),
            ("distilled", "policy high"),
            ("distilled", "policy low"),
            ("distilled", "averaged"),
            ("parent", "averaged"),
            ("policy high", "averaged"),
            ("policy low", "averaged"),
            ("averaged", "fp8_unit"),
            ("averaged", "fp8"),
            ("fp8_unit", "fp8"),
        ):
            tell(arm, after, arm, before)
    for arm in arms:
        for stage in found[arm]:
            tell(arm, stage, "parent", "parent")
            if stage == "averaged":
                tell(arm, stage, "parent", "averaged")
            if arm != "puzzle":
                tell("puzzle", stage, arm, stage)
    return told


def _over_runs(differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By effort the mean over all arms and seeds, with a t interval over those runs, which share their problems.

    Nothing of a single run, which has no interval.
    """
    told: dict[str, Any] = {}
    for effort in differences[0] if differences else ():
        points = [each for of_arm in differences for each in of_arm[effort]["by_seed"]]
        if len(points) < 2:
            continue
        interval = ttest_1samp(points, 0).confidence_interval()
        told[effort] = {
            "runs": len(points),
            "points": fmean(points),
            "low_points": float(interval.low),
            "high_points": float(interval.high),
        }
    return told


def _compare(model: Sequence[Replies], other: Sequence[Replies]) -> dict[str, Any]:
    """By effort and over all of them: points with their interval over the mean of the seeds, and each seed's own."""

    def solved(replies: Replies, effort: str) -> Verdicts:
        efforts = list(replies) if effort == "mean" else [effort]
        return average([replies[each]["solved"] for each in efforts])

    told = {}
    both = min(len(model), len(other))
    model, other = model[:both], other[:both]
    for effort in (*model[0], "mean"):
        ours, theirs = ([solved(one, effort) for one in seeds] for seeds in (model, other))
        points = [100 * (accuracy(one) - accuracy(another)) for one, another in zip(ours, theirs, strict=True)]
        told[effort] = asdict(difference(average(ours), average(theirs))) | {"by_seed": points}
    return told


if __name__ == "__main__":
    main()

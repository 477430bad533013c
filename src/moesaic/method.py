"""The whole method in plain Python: what a notebook calls, and where to start reading.

    from moesaic.method import compress, search

    found = search(parent, data, recipe, directory)      # rank, score, cost, solve, refine, prune
    made = compress(parent, data, recipe, directory)     # the same, then recover and measure

Each line below is one stage, whose folder holds everything about it. The compiled pipelines run the same stages in the
same order on Kubeflow, and add baselines, a deployment bundle, a report and the model registry.
"""

from dataclasses import dataclass
from pathlib import Path

from moesaic.core.config import Config
from moesaic.core.workbench import Workbench
from moesaic.data.sets import DataSets
from moesaic.pipelines.recipe import Recipe
from moesaic.stages import STAGES


@dataclass(frozen=True)
class Found:
    """What a search found, as directories."""

    ranking: Path
    scores: Path
    costs: Path
    architecture: Path
    child: Path
    """The pruned checkpoint."""


@dataclass(frozen=True)
class Compressed:
    """What a run made, as directories."""

    found: Found
    distilled: Path
    child: Path
    """The recovered checkpoint, with scales for an FP8 KV cache."""
    evaluations: dict[str, Path]
    """Of ``parent``, ``pruned``, ``distilled`` and ``child``."""


def search(parent: Path, data: DataSets, recipe: Recipe, directory: Path) -> Found:
    """Find and assemble the best child under the recipe's limits, without training anything.

    Args:
        parent: a checkpoint.
        data: its calibration sets are used.
        recipe: every value.
        directory: what is made, and kept for the next call.

    Raises:
        MoesaicError: for inputs that cannot be used, limits that no child keeps, a stage that fails.
    """
    return _search(Workbench(directory), parent, data, recipe)


def compress(parent: Path, data: DataSets, recipe: Recipe, directory: Path) -> Compressed:
    """Search, then recover the child's accuracy by distillation and reinforcement learning, and measure it.

    Args and errors: as :func:`search`; ``data`` is used whole.
    """
    bench = Workbench(directory)
    traces = bench.run(STAGES["generate_traces"], recipe.generate_traces, model=parent, prompts=data.prompts)

    def distill(child: Path, prefix: str = "") -> Path:
        config = recipe.earlier_distill if prefix else recipe.distill
        local = child
        for stage, own in (("fit_routers", recipe.fit_routers), ("distill_blocks", recipe.distill_blocks)):
            local = bench.run(
                STAGES[stage], own, prefix + stage, child=local, parent=parent, calibration=data.calibration_short
            )
        return bench.run(STAGES["distill"], config, f"{prefix}distill", child=local, parent=parent, traces=traces)

    def evaluate(model: Path, name: str) -> Path:
        return bench.run(STAGES["evaluate"], recipe.evaluate, f"evaluation_{name}", model=model, tests=data.tests)

    shrunk = parent
    for number in range(1, recipe.rounds):
        prefix = f"round_{number}_"
        shrunk = distill(_search(bench, shrunk, data, recipe, prefix).child, prefix)
    found = _search(bench, shrunk, data, recipe)
    distilled = distill(found.child)
    policies = [
        bench.run(
            STAGES["reinforce"], policy, f"policy_{policy.name}", model=distilled, prompts=data.prompts, traces=traces
        )
        for policy in recipe.policies
    ]
    averaged = bench.run(STAGES["average_checkpoints"], recipe.average_checkpoints, policies=policies)
    child = bench.run(STAGES["calibrate_kv"], recipe.calibrate_kv, model=averaged, calibration=data.calibration_short)
    models = {"parent": parent, "pruned": found.child, "distilled": distilled, "child": child}
    return Compressed(found, distilled, child, {name: evaluate(model, name) for name, model in models.items()})


def _search(bench: Workbench, parent: Path, data: DataSets, recipe: Recipe, prefix: str = "") -> Found:
    """One round; ``prefix`` names the tasks of a round before the last."""
    limits = recipe.earlier_search_architecture if prefix else recipe.search_architecture
    short, long = data.calibration_short, data.calibration_long

    def run(stage: str, config: Config, **inputs: Path) -> Path:
        return bench.run(STAGES[stage], config, prefix + stage, **inputs)

    ranking = run("rank_experts", recipe.rank_experts, parent=parent, calibration_short=short)
    scores = run(
        "score_blocks",
        recipe.score_blocks,
        parent=parent,
        ranking=ranking,
        calibration_short=short,
        calibration_long=long,
    )
    costs = run("measure_costs", recipe.measure_costs, parent=parent)
    chosen = run("search_architecture", limits, parent=parent, scores=scores, costs=costs)
    architecture = run(
        "refine_architecture",
        recipe.refine_architecture,
        parent=parent,
        ranking=ranking,
        scores=scores,
        costs=costs,
        architecture=chosen,
        calibration_short=short,
        calibration_long=long,
    )
    child = run("prune_model", recipe.prune_model, parent=parent, ranking=ranking, architecture=architecture)
    return Found(ranking, scores, costs, architecture, child)

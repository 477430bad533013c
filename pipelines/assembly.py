"""From a model to a child of it: rank, score and cost every block, solve for the best assembly, prune.

rank_experts -> score_blocks -+
measure_costs ----------------+-> search_architecture -> refine_architecture -> prune_model
"""

from dataclasses import dataclass
from typing import Any

from kfp import dsl

from components.evaluate.component import evaluate
from components.measure_costs.component import measure_costs
from components.prune_model.component import prune_model
from components.rank_experts.component import rank_experts
from components.refine_architecture.component import refine_architecture
from components.score_blocks.component import score_blocks
from components.search_architecture.component import search_architecture


@dataclass(frozen=True)
class AssemblyConfigs:
    """Pipeline parameters: one config, as JSON, for each of the stages; ``version`` is the code's."""

    version: Any
    rank_experts: Any
    score_blocks: Any
    measure_costs: Any
    search_architecture: Any
    refine_architecture: Any
    prune_model: Any


@dataclass(frozen=True)
class Assembly:
    """What the tasks of :func:`assemble` hand on."""

    ranking: Any
    scores: Any
    costs: Any
    architecture: Any
    child: Any
    rivals: Any
    """Configs of ``prune_model`` for the baselines of equal budget, a list that only exists when the pipeline runs."""


def assemble(configs: AssemblyConfigs, parent: Any, calibration_short: Any, calibration_long: Any) -> Assembly:
    """Add the tasks to the pipeline that is being described."""
    version = configs.version
    ranking = rank_experts(
        config=configs.rank_experts, version=version, parent=parent, calibration_short=calibration_short
    ).outputs["ranking"]
    scores = score_blocks(
        config=configs.score_blocks,
        version=version,
        parent=parent,
        ranking=ranking,
        calibration_short=calibration_short,
        calibration_long=calibration_long,
    ).outputs["scores"]
    costs = measure_costs(config=configs.measure_costs, version=version, parent=parent).outputs["costs"]
    chosen = search_architecture(
        config=configs.search_architecture, version=version, parent=parent, scores=scores, costs=costs
    ).outputs["architecture"]
    found = refine_architecture(
        config=configs.refine_architecture,
        version=version,
        parent=parent,
        ranking=ranking,
        scores=scores,
        costs=costs,
        architecture=chosen,
        calibration_short=calibration_short,
        calibration_long=calibration_long,
    ).outputs
    child = prune(configs.prune_model, version, parent, ranking, found["refined"])
    return Assembly(ranking, scores, costs, found["refined"], child, found["Output"])


def prune(config: Any, version: Any, parent: Any, ranking: Any, architecture: Any) -> Any:
    """Add the task that assembles one candidate; its checkpoint."""
    return prune_model(
        config=config, version=version, parent=parent, ranking=ranking, architecture=architecture
    ).outputs["child"]


def evaluate_rivals(evaluate_config: Any, version: Any, parent: Any, found: Assembly, tests: Any) -> dsl.Collected:
    """Add the tasks that assemble and evaluate every baseline; their evaluations."""
    with dsl.ParallelFor(found.rivals) as candidate:
        rival = prune(candidate, version, parent, found.ranking, found.architecture)
        measured = evaluate(config=evaluate_config, version=version, model=rival, tests=tests)
    return dsl.Collected(measured.outputs["evaluation"])

"""The search: rank, score and cost every block, solve for the best child, assemble it, measure it, report.

    ingest -> rank_experts -> score_blocks -+
              measure_costs ----------------+-> search_architecture -> prune_model -> evaluate, benchmark -> report
                                                (and prune_model -> evaluate for every baseline)

Every stage's config is a parameter of its own, so that a change reruns that stage and what follows from it only.
"""

from typing import NamedTuple

from kfp import dsl

from components.benchmark.component import benchmark
from components.evaluate.component import evaluate
from components.ingest.component import ingest
from components.measure_costs.component import measure_costs
from components.prune_model.component import prune_model
from components.rank_experts.component import rank_experts
from components.report.component import report
from components.score_blocks.component import score_blocks
from components.search_architecture.component import search_architecture

VERSION = "0.1.0"


class Outputs(NamedTuple):
    """What a run of the pipeline leaves behind."""

    child: dsl.Model
    report: dsl.Artifact


@dsl.pipeline(name="search", description="Find, assemble and measure the best child of a mixture-of-experts model")
def search(
    version: str,
    ingest_config: str,
    rank_experts_config: str,
    score_blocks_config: str,
    measure_costs_config: str,
    search_architecture_config: str,
    prune_model_config: str,
    evaluate_config: str,
    benchmark_config: str,
    report_config: str,
) -> Outputs:
    """Each ``*_config`` is a stage's config as JSON; ``version`` is the code's, a part of every task's cache key."""
    given = ingest(config=ingest_config, version=version).outputs
    parent, tests = given["parent"], given["tests"]
    short, long = given["calibration_short"], given["calibration_long"]
    ranking = rank_experts(config=rank_experts_config, version=version, parent=parent, calibration_short=short).outputs[
        "ranking"
    ]
    scores = score_blocks(
        config=score_blocks_config,
        version=version,
        parent=parent,
        ranking=ranking,
        calibration_short=short,
        calibration_long=long,
    ).outputs["scores"]
    costs = measure_costs(config=measure_costs_config, version=version, parent=parent).outputs["costs"]
    found = search_architecture(
        config=search_architecture_config, version=version, parent=parent, scores=scores, costs=costs
    ).outputs
    architecture = found["architecture"]
    child = prune_model(
        config=prune_model_config, version=version, parent=parent, ranking=ranking, architecture=architecture
    ).outputs["child"]
    evaluation_parent = evaluate(config=evaluate_config, version=version, model=parent, tests=tests)
    evaluation_child = evaluate(config=evaluate_config, version=version, model=child, tests=tests)
    with dsl.ParallelFor(found["Output"]) as candidate:
        pruned = prune_model(
            config=candidate, version=version, parent=parent, ranking=ranking, architecture=architecture
        )
        baseline = evaluate(config=evaluate_config, version=version, model=pruned.outputs["child"], tests=tests)
    measured = benchmark(config=benchmark_config, version=version, parent=parent, child=child)
    page = report(
        config=report_config,
        version=version,
        ranking=ranking,
        scores=scores,
        costs=costs,
        architecture=architecture,
        evaluation_parent=evaluation_parent.outputs["evaluation"],
        evaluation_child=evaluation_child.outputs["evaluation"],
        baselines=dsl.Collected(baseline.outputs["evaluation"]),
        measurements=measured.outputs["measurements"],
    )
    return Outputs(child=child, report=page.outputs["report"])

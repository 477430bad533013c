"""The search: rank, score and cost every block, solve for the best child, assemble it, measure it, report.

    ingest -> assemble -> evaluate, benchmark -> report
                 +-> prune_model -> evaluate, for every baseline

Every stage's config is a parameter of its own, so that a change reruns that stage and what follows from it only.
"""

from typing import NamedTuple

from kfp import dsl

from components.benchmark.component import benchmark
from components.evaluate.component import evaluate
from components.ingest.component import ingest
from components.report.component import report
from pipelines.assembly import AssemblyConfigs, assemble, evaluate_rivals

VERSION = "0.5.0"


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
    refine_architecture_config: str,
    prune_model_config: str,
    evaluate_config: str,
    benchmark_config: str,
    report_config: str,
) -> Outputs:
    """Each ``*_config`` is a stage's config as JSON; ``version`` is the code's, a part of every task's cache key."""
    given = ingest(config=ingest_config, version=version).outputs
    parent, tests = given["parent"], given["tests"]
    configs = AssemblyConfigs(
        version=version,
        rank_experts=rank_experts_config,
        score_blocks=score_blocks_config,
        measure_costs=measure_costs_config,
        search_architecture=search_architecture_config,
        refine_architecture=refine_architecture_config,
        prune_model=prune_model_config,
    )
    found = assemble(configs, parent, given["calibration_short"], given["calibration_long"])
    evaluation_parent = evaluate(config=evaluate_config, version=version, model=parent, tests=tests)
    evaluation_child = evaluate(config=evaluate_config, version=version, model=found.child, tests=tests)
    baselines = evaluate_rivals(evaluate_config, version, parent, found, tests)
    measured = benchmark(config=benchmark_config, version=version, parent=parent, child=found.child)
    page = report(
        config=report_config,
        version=version,
        ranking=found.ranking,
        scores=found.scores,
        costs=found.costs,
        architecture=found.architecture,
        evaluation_parent=evaluation_parent.outputs["evaluation"],
        evaluation_child=evaluation_child.outputs["evaluation"],
        baselines=baselines,
        measurements=measured.outputs["measurements"],
    )
    return Outputs(child=found.child, report=page.outputs["report"])

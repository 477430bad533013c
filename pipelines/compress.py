"""The whole method: search, recover, deploy, measure, report, promote. Several rounds prune and distil more than once.

    ingest -> generate_traces
           -> [assemble -> distill] for every round but the last
           -> assemble -> recover -> deploy -> report -> promote
                  +-> the uniformly pruned child -> the same recovery

Every round scores anew, because what a block is worth depends on the blocks around it (paper A's successor prunes in
three rounds). The number of rounds shapes the graph, so each number is a pipeline of its own, compiled from one source.
"""

from typing import Any, NamedTuple

from kfp import dsl

from components.benchmark.component import benchmark
from components.calibrate_kv.component import calibrate_kv
from components.evaluate.component import evaluate
from components.generate_traces.component import generate_traces
from components.ingest.component import ingest
from components.report.component import report
from moesaic.pipelines import pipeline_name
from pipelines.assembly import Assembly, AssemblyConfigs, assemble, evaluate_rivals, prune
from pipelines.deployment import DeploymentConfigs, deploy, put_forward
from pipelines.recovery import Material, RecoveryConfigs, learn, recover

VERSION = "0.4.0"
ROUNDS = (1, 2)
"""Numbers of rounds that are compiled and committed."""


class Outputs(NamedTuple):
    """What a run of the pipeline leaves behind."""

    child: dsl.Model
    bundle: dsl.Model
    report: dsl.Artifact
    promotion: dsl.Artifact


def compress(rounds: int) -> Any:
    """The pipeline with so many rounds of pruning; ``earlier_*`` configs are those of all rounds but the last."""

    @dsl.pipeline(
        name=pipeline_name(rounds), description=f"Compress a mixture-of-experts reasoning model in {rounds} round(s)"
    )
    def pipeline(
        version: str,
        ingest_config: str,
        generate_traces_config: str,
        rank_experts_config: str,
        score_blocks_config: str,
        measure_costs_config: str,
        earlier_search_architecture_config: str,
        earlier_distill_config: str,
        search_architecture_config: str,
        prune_model_config: str,
        baseline_config: str,
        distill_blocks_config: str,
        distill_config: str,
        reinforce_configs: list[str],
        average_checkpoints_config: str,
        calibrate_kv_config: str,
        evaluate_config: str,
        evaluate_fp8_unit_config: str,
        evaluate_fp8_config: str,
        gather_recovery_config: str,
        benchmark_config: str,
        export_engine_config: str,
        benchmark_serving_config: str,
        report_config: str,
        promote_config: str,
    ) -> Outputs:
        """Each ``*_config`` is a stage's config as JSON; ``version`` is the code's, a part of each task's cache key."""
        given = ingest(config=ingest_config, version=version).outputs
        parent, tests, calibration = given["parent"], given["tests"], given["calibration_short"]
        traces = generate_traces(
            config=generate_traces_config, version=version, model=parent, prompts=given["prompts"]
        ).outputs["traces"]
        material = Material(parent, traces, given["prompts"], calibration, tests)

        def shrink(model: Any, search_config: Any) -> Assembly:
            configs = AssemblyConfigs(
                version=version,
                rank_experts=rank_experts_config,
                score_blocks=score_blocks_config,
                measure_costs=measure_costs_config,
                search_architecture=search_config,
                prune_model=prune_model_config,
            )
            return assemble(configs, model, calibration, given["calibration_long"])

        def measure(model: Any, config: Any = evaluate_config) -> Any:
            return evaluate(config=config, version=version, model=model, tests=tests).outputs["evaluation"]

        recovery = RecoveryConfigs(
            version=version,
            distill_blocks=distill_blocks_config,
            distill=distill_config,
            policies=reinforce_configs,
            average_checkpoints=average_checkpoints_config,
            calibrate_kv=calibrate_kv_config,
            evaluate=evaluate_config,
            evaluate_fp8_unit=evaluate_fp8_unit_config,
            evaluate_fp8=evaluate_fp8_config,
            gather_recovery=gather_recovery_config,
        )

        deployment = DeploymentConfigs(
            version=version,
            export_engine=export_engine_config,
            benchmark_serving=benchmark_serving_config,
            promote=promote_config,
        )

        def compare_speed(child: Any) -> Any:
            measured = benchmark(config=benchmark_config, version=version, parent=parent, child=child)
            return measured.outputs["measurements"]

        model = parent
        for _ in range(rounds - 1):
            earlier = shrink(model, earlier_search_architecture_config)
            model = learn(version, distill_blocks_config, earlier_distill_config, earlier.child, material)
        found = shrink(model, search_architecture_config)
        uniform = prune(baseline_config, version, model, found.ranking, found.architecture)
        evaluation_child = measure(found.child)
        child = recover(recovery, material, found.child, evaluation_child)
        baseline = recover(recovery, material, uniform, measure(uniform))
        scaled_parent = calibrate_kv(
            config=calibrate_kv_config, version=version, model=parent, calibration=calibration
        ).outputs["calibrated"]
        deployed = deploy(deployment, scaled_parent, child.child)
        page = report(
            config=report_config,
            version=version,
            ranking=found.ranking,
            scores=found.scores,
            costs=found.costs,
            architecture=found.architecture,
            evaluation_parent=measure(parent),
            evaluation_child=evaluation_child,
            baselines=evaluate_rivals(evaluate_config, version, model, found, tests),
            measurements=compare_speed(found.child),
            recovery=child.recovery,
            recovery_baseline=baseline.recovery,
            evaluation_parent_fp8=measure(scaled_parent, evaluate_fp8_config),
            measurements_baseline=compare_speed(uniform),
            serving=deployed.serving,
        ).outputs["report"]
        promotion = put_forward(deployment, child.child, page, deployed.bundle)
        return Outputs(child=child.child, bundle=deployed.bundle, report=page, promotion=promotion)

    return pipeline

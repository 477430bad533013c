"""The whole method: search, recover, deploy, measure, report, promote. Several rounds prune and distil more than once.

    ingest -> generate_traces
           -> [assemble -> distill] for every round but the last
           -> assemble -> recover -> deploy -> report -> promote
                  +-> the control, a baseline's child -> the same recovery

Every round scores anew, because what a block is worth depends on the blocks around it (paper A's successor prunes in
three rounds). The control tells what the search is worth after recovery, and takes half of all training, so it can be
left out. Rounds and control shape the graph, so each combination is a pipeline of its own, compiled from one source.
"""

from types import SimpleNamespace
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
from pipelines.recovery import LearningConfigs, Material, RecoveryConfigs, learn, recover

VERSION = "0.6.0"
ROUNDS = (1, 2)
"""Numbers of rounds that are compiled and committed."""


class Outputs(NamedTuple):
    """What a run of the pipeline leaves behind."""

    child: dsl.Model
    bundle: dsl.Model
    verdict: dsl.Artifact
    report: dsl.Artifact
    promotion: dsl.Artifact


def compress(rounds: int, control: bool = True) -> Any:
    """The pipeline with so many rounds of pruning; ``earlier_*`` configs are those of all rounds but the last."""

    @dsl.pipeline(
        name=pipeline_name(rounds, control),
        description=f"Compress a mixture-of-experts reasoning model in {rounds} round(s)",
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
        refine_architecture_config: str,
        prune_model_config: str,
        fit_routers_config: str,
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
        validate_bundle_config: str,
        benchmark_serving_config: str,
        report_config: str,
        promote_config: str,
        baseline_config: str = "",
    ) -> Outputs:
        """Each ``*_config`` is a stage's config as JSON; ``version`` is the code's, a part of each task's cache key."""
        return _Tasks(rounds, control, SimpleNamespace(**locals())).add()

    return pipeline


class _Tasks:
    """The tasks of the pipeline that is being described; its parameters by their names are ``given``."""

    def __init__(self, rounds: int, control: bool, given: SimpleNamespace) -> None:
        self._rounds, self._control, self._given, self._version = rounds, control, given, given.version
        self._inputs = ingest(config=given.ingest_config, version=given.version).outputs
        self._parent = self._inputs["parent"]

    def add(self) -> Outputs:
        """Add them all, in the order of the method."""
        given, material = self._given, self._material()
        model = self._parent
        for _ in range(self._rounds - 1):
            earlier = self._assemble(model, given.earlier_search_architecture_config)
            model = learn(self._version, self._learning(given.earlier_distill_config), earlier.child, material)
        found = self._assemble(model, given.search_architecture_config)
        evaluation_child = self._evaluate(found.child)
        child = recover(self._recovery(), material, found.child, evaluation_child)
        measurements = self._benchmark(found.child)
        control = self._recover_control(model, found, material) if self._control else {}
        scaled_parent = calibrate_kv(
            config=given.calibrate_kv_config,
            version=self._version,
            model=self._parent,
            calibration=self._inputs["calibration_short"],
        ).outputs["calibrated"]
        deployed = deploy(self._deployment(), scaled_parent, child.child, self._inputs["prompts"])
        page = report(
            config=given.report_config,
            version=self._version,
            ranking=found.ranking,
            scores=found.scores,
            costs=found.costs,
            architecture=found.architecture,
            evaluation_parent=self._evaluate(self._parent),
            evaluation_child=evaluation_child,
            baselines=evaluate_rivals(given.evaluate_config, self._version, model, found, self._inputs["tests"]),
            measurements=measurements,
            recovery=child.recovery,
            evaluation_parent_fp8=self._evaluate(scaled_parent, given.evaluate_fp8_config),
            serving=deployed.serving,
            **control,
        ).outputs["report"]
        promotion = put_forward(self._deployment(), child.child, page, deployed)
        return Outputs(
            child=child.child, bundle=deployed.bundle, verdict=deployed.verdict, report=page, promotion=promotion
        )

    def _recover_control(self, model: Any, found: Assembly, material: Material) -> dict[str, Any]:
        """What the report says of the control: its recovery and its speed."""
        pruned = prune(self._given.baseline_config, self._version, model, found.ranking, found.architecture)
        recovered = recover(self._recovery(), material, pruned, self._evaluate(pruned))
        return {"recovery_baseline": recovered.recovery, "measurements_baseline": self._benchmark(pruned)}

    def _material(self) -> Material:
        prompts = self._inputs["prompts"]
        traces = generate_traces(
            config=self._given.generate_traces_config, version=self._version, model=self._parent, prompts=prompts
        ).outputs["traces"]
        return Material(self._parent, traces, prompts, self._inputs["calibration_short"], self._inputs["tests"])

    def _assemble(self, model: Any, search_config: Any) -> Assembly:
        configs = AssemblyConfigs(
            version=self._version,
            rank_experts=self._given.rank_experts_config,
            score_blocks=self._given.score_blocks_config,
            measure_costs=self._given.measure_costs_config,
            search_architecture=search_config,
            refine_architecture=self._given.refine_architecture_config,
            prune_model=self._given.prune_model_config,
        )
        return assemble(configs, model, self._inputs["calibration_short"], self._inputs["calibration_long"])

    def _evaluate(self, model: Any, config: Any = None) -> Any:
        config = config or self._given.evaluate_config
        return evaluate(config=config, version=self._version, model=model, tests=self._inputs["tests"]).outputs[
            "evaluation"
        ]

    def _benchmark(self, child: Any) -> Any:
        config = self._given.benchmark_config
        measured = benchmark(config=config, version=self._version, parent=self._parent, child=child)
        return measured.outputs["measurements"]

    def _learning(self, distill_config: Any) -> LearningConfigs:
        return LearningConfigs(self._given.fit_routers_config, self._given.distill_blocks_config, distill_config)

    def _recovery(self) -> RecoveryConfigs:
        given = self._given
        return RecoveryConfigs(
            version=self._version,
            learning=self._learning(given.distill_config),
            policies=given.reinforce_configs,
            average_checkpoints=given.average_checkpoints_config,
            calibrate_kv=given.calibrate_kv_config,
            evaluate=given.evaluate_config,
            evaluate_fp8_unit=given.evaluate_fp8_unit_config,
            evaluate_fp8=given.evaluate_fp8_config,
            gather_recovery=given.gather_recovery_config,
        )

    def _deployment(self) -> DeploymentConfigs:
        given = self._given
        return DeploymentConfigs(
            version=self._version,
            export_engine=given.export_engine_config,
            validate_bundle=given.validate_bundle_config,
            benchmark_serving=given.benchmark_serving_config,
            promote=given.promote_config,
        )

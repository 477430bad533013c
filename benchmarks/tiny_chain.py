"""Every stage on the tiny reasoner, as small as it goes: what each takes from which."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.core.config import Config
from moesaic.costs.workload import Workload
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.measure.benchmark.stage import BenchmarkConfig
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig, SweptWorkload
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.measure.gather_recovery.stage import GatherRecoveryConfig
from moesaic.measure.report.stage import ReportConfig
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.store import Store
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.search_architecture.stage import SearchArchitectureConfig
from moesaic.search.space import SearchSpace
from moesaic.stages import STAGES

EXAMPLE = Path("examples/tiny_reasoner")
SETS = {"calibration_short": 24, "calibration_long": 8, "prompts": 48, "tests": 24}
"""Rows of each data set, spread over it."""


@dataclass(frozen=True)
class Step:
    """A stage with its config and where its inputs come from."""

    name: str
    config: Config
    inputs: Mapping[str, str | list[str]] = field(default_factory=dict)
    """``step.output``, by the input's name."""
    stage: str = ""
    """The step's name where it is empty; else the step only prepares what others need and is not killed."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the artifacts it makes."""
        return STAGES[self.stage or self.name].output_names

    def needs(self) -> Iterator[str]:
        """Names of the steps before it."""
        for sources in self.inputs.values():
            for source in sources if isinstance(sources, list) else [sources]:
                yield source.split(".")[0]


def put_inputs(store: Store, directory: Path) -> tuple[str, dict[str, str]]:
    """Put the model and small data sets, cut in ``directory``, into the store; the ids of their manifests."""
    sets = {}
    parent = store.add_directory(EXAMPLE / "parent", "model", format="safetensors", producer="example").id
    for name, count in SETS.items():
        lines = (EXAMPLE / "data" / f"{'test' if name == 'tests' else name}.jsonl").read_text().splitlines(True)
        file = directory / f"{name}.jsonl"
        file.write_text("".join(lines[:: len(lines) // count][:count]))
        sets[name] = store.add_file(file, "dataset", format="jsonl", producer="example").id
    return parent, sets


def steps(parent: str, sets: Mapping[str, str]) -> tuple[Step, ...]:
    """Every stage, small, and what they need of each other; the arguments are ids of manifests."""
    space = SearchSpace(expert_counts=(16, 8), windows=(64,))
    workload = Workload(name="short", input_tokens=64, output_tokens=16, concurrency=2)
    evaluate = EvaluateConfig(efforts=("low", "high"), problems_per_task=1, max_new_tokens=24)
    policy = ReinforceConfig(
        steps=3,
        efforts=("low",),
        prompts_per_step=4,
        generations_per_prompt=2,
        replies_per_forward=8,
        max_new_tokens=24,
        checkpoint_every_steps=1,
        precision="float32",
    )
    prune, short = PruneModelConfig, "ingest.calibration_short"

    def evaluation(step: str, model: str, **changes: Any) -> Step:
        given = {"model": model, "tests": "ingest.tests"}
        return Step(step, evaluate.model_copy(update=changes), given, "" if step == "evaluate" else "evaluate")

    def reinforce(step: str, stage: str, **changes: Any) -> Step:
        given = {"model": "distill.trained", "prompts": "ingest.prompts", "traces": "generate_traces.traces"}
        return Step(step, policy.model_copy(update=changes), given, stage)

    return (
        Step("ingest", IngestConfig(parent=parent, **sets)),
        Step(
            "rank_experts",
            RankExpertsConfig(max_tokens=128),
            {"parent": "ingest.parent", "calibration_short": short},
        ),
        Step(
            "score_blocks",
            ScoreBlocksConfig(space=space, max_sequences=4, max_tokens=512),
            {
                "parent": "ingest.parent",
                "ranking": "rank_experts.ranking",
                "calibration_short": short,
                "calibration_long": "ingest.calibration_long",
            },
        ),
        Step(
            "measure_costs",
            MeasureCostsConfig(space=space, workloads=(workload,), repeats=1),
            {"parent": "ingest.parent"},
        ),
        Step(
            "search_architecture",
            SearchArchitectureConfig(max_experts_ratio=0.7, frontier_points=2, random_seeds=(0,)),
            {"parent": "ingest.parent", "scores": "score_blocks.scores", "costs": "measure_costs.costs"},
        ),
        Step(
            "refine_architecture",
            RefineArchitectureConfig(max_sequences=4, max_tokens=512, evaluations=4, assemblies_per_round=2),
            {
                "parent": "ingest.parent",
                "ranking": "rank_experts.ranking",
                "scores": "score_blocks.scores",
                "costs": "measure_costs.costs",
                "architecture": "search_architecture.architecture",
                "calibration_short": short,
                "calibration_long": "ingest.calibration_long",
            },
        ),
        *(
            Step(
                name,
                prune(candidate=candidate),
                {
                    "parent": "ingest.parent",
                    "ranking": "rank_experts.ranking",
                    "architecture": "refine_architecture.refined",
                },
                stage,
            )
            for name, candidate, stage in (("prune_model", "puzzle", ""), ("prune_uniform", "uniform", "prune_model"))
        ),
        Step(
            "generate_traces",
            GenerateTracesConfig(max_new_tokens=48, keep_truncated=True, held_out_share=0.2),
            {"model": "ingest.parent", "prompts": "ingest.prompts"},
        ),
        Step(
            "distill_blocks",
            DistillBlocksConfig(steps=4, max_sequences=8, max_tokens=64, checkpoint_every_steps=1),
            {"child": "prune_model.child", "parent": "ingest.parent", "calibration": short},
        ),
        Step(
            "distill",
            DistillConfig(
                steps=4,
                sequence_tokens=128,
                rows_per_step=2,
                evaluate_every_steps=2,
                checkpoint_every_steps=1,
                precision="float32",
            ),
            {"child": "distill_blocks.trained", "parent": "ingest.parent", "traces": "generate_traces.traces"},
        ),
        reinforce("reinforce", ""),
        reinforce("reinforce_mixed", "reinforce", name="mixed", seed=1),
        Step(
            "average_checkpoints",
            AverageCheckpointsConfig(weights=(1, 2)),
            {"policies": ["reinforce.policy", "reinforce_mixed.policy"]},
        ),
        Step(
            "calibrate_kv",
            CalibrateKvConfig(max_sequences=8, max_tokens=128, precision="float32"),
            {"model": "average_checkpoints.averaged", "calibration": short},
        ),
        evaluation("evaluate", "ingest.parent"),
        evaluation("evaluate_child", "prune_model.child"),
        evaluation("evaluate_uniform", "prune_uniform.child"),
        evaluation("evaluate_distilled", "distill.trained"),
        evaluation("evaluate_high", "reinforce.policy"),
        evaluation("evaluate_mixed", "reinforce_mixed.policy"),
        evaluation("evaluate_averaged", "average_checkpoints.averaged"),
        evaluation("evaluate_fp8_unit", "calibrate_kv.calibrated", kv_cache="fp8_unit"),
        evaluation("evaluate_fp8", "calibrate_kv.calibrated", kv_cache="fp8"),
        Step(
            "gather_recovery",
            GatherRecoveryConfig(),
            {
                "traces": "generate_traces.traces",
                "distilled": "distill.trained",
                "evaluation_pruned": "evaluate_child.evaluation",
                "evaluation_distilled": "evaluate_distilled.evaluation",
                "evaluations_policies": ["evaluate_high.evaluation", "evaluate_mixed.evaluation"],
                "evaluation_averaged": "evaluate_averaged.evaluation",
                "evaluation_fp8_unit": "evaluate_fp8_unit.evaluation",
                "evaluation_fp8": "evaluate_fp8.evaluation",
            },
        ),
        Step(
            "export_engine",
            ExportEngineConfig(target="tensorrt_llm"),
            {"child": "calibrate_kv.calibrated"},
        ),
        Step(
            "benchmark",
            BenchmarkConfig(batch_sizes=(2,), input_tokens=(64,), output_tokens=4, repeats=1),
            {"parent": "ingest.parent", "child": "prune_model.child"},
        ),
        Step(
            "benchmark_serving",
            BenchmarkServingConfig(
                workloads=(SweptWorkload(name="tiny", input_tokens=24, output_tokens=64, concurrencies=(1,)),),
                requests_per_user=2,
                repeats=2,
            ),
            {"parent": "ingest.parent", "child": "calibrate_kv.calibrated"},
        ),
        Step(
            "report",
            ReportConfig(),
            {
                "ranking": "rank_experts.ranking",
                "scores": "score_blocks.scores",
                "costs": "measure_costs.costs",
                "architecture": "refine_architecture.refined",
                "evaluation_parent": "evaluate.evaluation",
                "evaluation_child": "evaluate_child.evaluation",
                "baselines": ["evaluate_uniform.evaluation"],
                "measurements": "benchmark.measurements",
                "recovery": "gather_recovery.recovery",
            },
        ),
        Step(
            "promote",
            PromoteConfig(model="killed", margin_points={}, min_request_efficiency={}, kv_margin_points={}),
            {"child": "calibrate_kv.calibrated", "report": "report.report", "bundle": "export_engine.bundle"},
        ),
    )


def wanted_steps(all_steps: Sequence[Step], stages: Sequence[str]) -> list[Step]:
    """The steps of these stages and all that they need, in order."""
    needed = set(stages)
    for step in reversed(all_steps):
        if step.name in needed:
            needed.update(step.needs())
    return [step for step in all_steps if step.name in needed]

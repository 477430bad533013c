"""A recipe: complete values for a pipeline. What is built, never where."""

from collections.abc import Collection
from typing import Self

from pydantic import model_validator

from moesaic.core.config import Config, ServingEngine
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig
from moesaic.measure.benchmark.stage import BenchmarkConfig
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.measure.gather_recovery.stage import GatherRecoveryConfig
from moesaic.measure.report.stage import ReportConfig
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig
from moesaic.recover.fit_routers.stage import FitRoutersConfig
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.search_architecture.stage import SearchArchitectureConfig

_CONTROL = "baseline_config"
"""The parameter that pipelines without a control do not need."""
_SEED_STEP = 1000
"""Between the seeds of two runs, so that policies of different runs never share one."""


class Recipe(Config):
    """One config for every stage but ``ingest``, whose config names the inputs."""

    rank_experts: RankExpertsConfig
    score_blocks: ScoreBlocksConfig
    measure_costs: MeasureCostsConfig
    search_architecture: SearchArchitectureConfig
    earlier_search_architecture: SearchArchitectureConfig
    """For all rounds but the last."""
    refine_architecture: RefineArchitectureConfig
    generate_traces: GenerateTracesConfig
    distill_blocks: DistillBlocksConfig
    distill: DistillConfig
    earlier_distill: DistillConfig
    """For all rounds but the last."""
    policies: tuple[ReinforceConfig, ...]
    """Trained from the same distilled checkpoint; the child is their average. The paper has two."""
    calibrate_kv: CalibrateKvConfig
    evaluate: EvaluateConfig
    benchmark: BenchmarkConfig
    benchmark_serving: BenchmarkServingConfig
    report: ReportConfig
    prune_model: PruneModelConfig = PruneModelConfig()
    fit_routers: FitRoutersConfig = FitRoutersConfig()
    baseline: PruneModelConfig | None = PruneModelConfig(candidate="uniform")
    """The control: a candidate that gets the same recovery, for comparison. None saves half of all training."""
    average_checkpoints: AverageCheckpointsConfig = AverageCheckpointsConfig()
    gather_recovery: GatherRecoveryConfig = GatherRecoveryConfig()
    export_engine: ExportEngineConfig = ExportEngineConfig(target="tensorrt_llm")
    """Of parent and child alike."""
    validate_bundle: ValidateBundleConfig = ValidateBundleConfig()
    promote: PromoteConfig = PromoteConfig()
    rounds: int = 1
    """Rounds of pruning and distillation before the child is recovered whole."""

    @model_validator(mode="after")
    def _measures_as_scored(self) -> Self:
        for name in ("metric", "balance", "long_weight"):
            scored, refined = getattr(self.score_blocks, name), getattr(self.refine_architecture, name)
            if scored != refined:
                raise ValueError(f"score_blocks.{name} is {scored!r}, refine_architecture.{name} {refined!r}; use one")
        return self

    @model_validator(mode="after")
    def _averages_all_policies(self) -> Self:
        weights = self.average_checkpoints.weights
        if not self.policies:
            raise ValueError("policies is empty; give one config of reinforce or more, with steps 0 to train nothing")
        if weights is not None and len(weights) != len(self.policies):
            raise ValueError(
                f"average_checkpoints.weights has {len(weights)} numbers for {len(self.policies)} policies; give one "
                "each, or none for equal ones"
            )
        return self

    @model_validator(mode="after")
    def _search_makes_the_control(self) -> Self:
        made = self.search_architecture.rivals
        if self.baseline and self.baseline.candidate not in made:
            raise ValueError(
                f"baseline.candidate is {self.baseline.candidate!r}, search_architecture makes {', '.join(made)}; "
                "choose one of these, or add it to search_architecture.baselines"
            )
        return self

    def seeded(self, seed: int) -> Self:
        """The same with other random draws in all that learns: 0 changes nothing."""
        shift = _SEED_STEP * seed
        return self.but(
            distill_blocks={"seed": self.distill_blocks.seed + shift},
            distill={"seed": self.distill.seed + shift},
            earlier_distill={"seed": self.earlier_distill.seed + shift},
            policies=tuple(policy.but(seed=policy.seed + shift) for policy in self.policies),
        )

    def served_by(self, engine: ServingEngine) -> Self:
        """The same, measured through another server; only vLLM can also be asked about the bundle."""
        return self.but(benchmark_serving={"engine": engine}, validate_bundle={"ask_engine": engine == "vllm"})

    def labelled(self, pipeline: str, recipe: str) -> Self:
        """The same, with what a model version made by it is to say of itself."""
        return self.but(promote={"pipeline": pipeline, "recipe": recipe})

    def arguments(self, ingest: IngestConfig, version: str, parameters: Collection[str]) -> dict[str, str | list[str]]:
        """Values for the parameters that a pipeline has."""
        configs = {name: getattr(self, name) for name in type(self).model_fields if name not in ("policies", "rounds")}
        configs = {name: config for name, config in configs.items() if config is not None}
        configs |= {
            "ingest": ingest,
            "evaluate_fp8_unit": self.evaluate.with_kv_cache("fp8_unit"),
            "evaluate_fp8": self.evaluate.with_kv_cache("fp8"),
        }
        values: dict[str, str | list[str]] = {f"{name}_config": config.to_json() for name, config in configs.items()}
        values |= {"version": version, "reinforce_configs": [policy.to_json() for policy in self.policies]}
        return {name: values[name] for name in parameters if name != _CONTROL or self.baseline}

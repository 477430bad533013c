"""Complete, named values for the pipelines: what to build. Where (paths, stores, devices) comes from outside."""

from collections.abc import Callable, Collection

from moesaic.configs import (
    AverageCheckpointsConfig,
    BenchmarkConfig,
    CalibrateKvConfig,
    Config,
    DistillBlocksConfig,
    DistillConfig,
    EvaluateConfig,
    GatherRecoveryConfig,
    GenerateTracesConfig,
    IngestConfig,
    Limits,
    MeasureCostsConfig,
    OptimizerConfig,
    PruneModelConfig,
    RankExpertsConfig,
    ReinforceConfig,
    ReportConfig,
    RewardConfig,
    ScoreBlocksConfig,
    SearchArchitectureConfig,
    SearchSpace,
    Workload,
)


class Recipe(Config):
    """One config for every stage but ``ingest``, whose config names the inputs."""

    rank_experts: RankExpertsConfig
    score_blocks: ScoreBlocksConfig
    measure_costs: MeasureCostsConfig
    search_architecture: SearchArchitectureConfig
    earlier_search_architecture: SearchArchitectureConfig
    """For all rounds but the last."""
    generate_traces: GenerateTracesConfig
    distill_blocks: DistillBlocksConfig
    distill: DistillConfig
    earlier_distill: DistillConfig
    """For all rounds but the last."""
    policies: tuple[ReinforceConfig, ...]
    calibrate_kv: CalibrateKvConfig
    evaluate: EvaluateConfig
    benchmark: BenchmarkConfig
    report: ReportConfig
    prune_model: PruneModelConfig = PruneModelConfig()
    baseline: PruneModelConfig = PruneModelConfig(candidate="uniform")
    """The candidate that gets the same recovery, for comparison."""
    average_checkpoints: AverageCheckpointsConfig = AverageCheckpointsConfig()
    gather_recovery: GatherRecoveryConfig = GatherRecoveryConfig()
    rounds: int = 1
    """Rounds of pruning and distillation before the child is recovered whole."""

    def arguments(self, ingest: IngestConfig, version: str, parameters: Collection[str]) -> dict[str, str | list[str]]:
        """Values for the parameters that a pipeline has."""
        configs = {name: getattr(self, name) for name in type(self).model_fields if name not in ("policies", "rounds")}
        configs |= {
            "ingest": ingest,
            "evaluate_fp8_unit": self.evaluate.model_copy(update={"kv_cache": "fp8_unit"}),
            "evaluate_fp8": self.evaluate.model_copy(update={"kv_cache": "fp8"}),
        }
        values: dict[str, str | list[str]] = {f"{name}_config": config.to_json() for name, config in configs.items()}
        values |= {"version": version, "reinforce_configs": [policy.to_json() for policy in self.policies]}
        return {name: values[name] for name in parameters}


def tiny_cpu() -> Recipe:
    """The tiny reasoner of ``examples/`` on two CPU cores, search and recovery, in minutes."""
    space = SearchSpace(expert_counts=(16, 14, 12, 10, 8, 6, 4), windows=(256, 128, 64, 32))
    long = Workload(name="long", input_tokens=2048, output_tokens=64, concurrency=4)
    short = Workload(name="short", input_tokens=128, output_tokens=128, concurrency=4)
    search = SearchArchitectureConfig(
        limits={"long": Limits(memory_ratio=0.45, throughput_ratio=1.1), "short": Limits(memory_ratio=0.85)},
        max_experts_ratio=0.65,
        min_windowed_share=1 / 3,
    )
    distill = DistillConfig(
        balance="trace",
        sequence_tokens=1024,
        rows_per_step=8,
        rows_per_forward=8,
        steps=100,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
        evaluate_every_steps=25,
        checkpoint_every_steps=25,
        precision="float32",
    )
    policy = ReinforceConfig(
        steps=40,
        prompts_per_step=16,
        generations_per_prompt=8,
        replies_per_forward=64,
        max_new_tokens=128,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
        checkpoint_every_steps=10,
        precision="float32",
    )
    return Recipe(
        rank_experts=RankExpertsConfig(max_sequences=128, max_tokens=1024),
        score_blocks=ScoreBlocksConfig(
            space=space, metric="kl", max_sequences=48, max_tokens=1024, batch_tokens=8192
        ),
        measure_costs=MeasureCostsConfig(space=space, workloads=(long, short), repeats=3),
        search_architecture=search,
        earlier_search_architecture=search.model_copy(
            update={
                "limits": {"long": Limits(memory_ratio=0.7), "short": Limits(memory_ratio=0.95)},
                "max_experts_ratio": 0.85,
                "min_windowed_share": 0.0,
            }
        ),
        generate_traces=GenerateTracesConfig(max_prompts=1200, max_new_tokens=128),
        distill_blocks=DistillBlocksConfig(),
        distill=distill,
        earlier_distill=distill.model_copy(update={"steps": 75}),
        policies=(
            policy.model_copy(update={"name": "high", "efforts": ("high",)}),
            policy.model_copy(
                update={
                    "name": "mixed",
                    "efforts": ("low", "medium", "high"),
                    "rewards": RewardConfig(length=0.5),
                    "seed": 1,
                }
            ),
        ),
        calibrate_kv=CalibrateKvConfig(max_sequences=64, max_tokens=1024, precision="float32"),
        evaluate=EvaluateConfig(problems_per_task=80, max_new_tokens=128, kv_cache="bf16"),
        benchmark=BenchmarkConfig(batch_sizes=(1, 4, 16), input_tokens=(128, 2048), workloads=(long, short), repeats=3),
        report=ReportConfig(title="The tiny reasoner, compressed on a CPU"),
    )


def tiny_cpu_fast() -> Recipe:
    """The same with less of everything, to see that it works."""
    full = tiny_cpu()
    return full.model_copy(
        update={
            "rank_experts": full.rank_experts.model_copy(update={"max_sequences": 32}),
            "score_blocks": full.score_blocks.model_copy(update={"max_sequences": 12}),
            "search_architecture": full.search_architecture.model_copy(update={"random_seeds": (0,)}),
            "generate_traces": full.generate_traces.model_copy(update={"max_prompts": 240}),
            "distill": full.distill.model_copy(update={"steps": 30}),
            "policies": tuple(policy.model_copy(update={"steps": 5}) for policy in full.policies),
            "evaluate": full.evaluate.model_copy(update={"problems_per_task": 20}),
            "benchmark": full.benchmark.model_copy(update={"batch_sizes": (4,), "repeats": 2}),
        }
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny_cpu": tiny_cpu, "tiny_cpu_fast": tiny_cpu_fast}
"""Recipes by the name that the command line takes."""

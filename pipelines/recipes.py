"""Complete, named values for the pipelines: what to build. Where (paths, stores, devices) comes from outside."""

from collections.abc import Callable
from dataclasses import dataclass

from moesaic.configs import (
    BenchmarkConfig,
    EvaluateConfig,
    IngestConfig,
    Limits,
    MeasureCostsConfig,
    PruneModelConfig,
    RankExpertsConfig,
    ReportConfig,
    ScoreBlocksConfig,
    SearchArchitectureConfig,
    SearchSpace,
    Workload,
)


@dataclass(frozen=True)
class SearchRecipe:
    """One config for every stage of the ``search`` pipeline but ``ingest``, whose config names the inputs."""

    rank_experts: RankExpertsConfig
    score_blocks: ScoreBlocksConfig
    measure_costs: MeasureCostsConfig
    search_architecture: SearchArchitectureConfig
    prune_model: PruneModelConfig
    evaluate: EvaluateConfig
    benchmark: BenchmarkConfig
    report: ReportConfig

    def arguments(self, ingest: IngestConfig, version: str) -> dict[str, str]:
        """The pipeline's parameters."""
        given = vars(self) | {"ingest": ingest}
        return {"version": version} | {f"{stage}_config": config.to_json() for stage, config in given.items()}


def tiny_cpu() -> SearchRecipe:
    """The tiny reasoner of ``examples/`` on two CPU cores, in minutes."""
    space = SearchSpace(expert_counts=(16, 14, 12, 10, 8, 6, 4), windows=(256, 128, 64, 32))
    long = Workload(name="long", input_tokens=2048, output_tokens=64, concurrency=4)
    short = Workload(name="short", input_tokens=128, output_tokens=128, concurrency=4)
    return SearchRecipe(
        rank_experts=RankExpertsConfig(max_sequences=128, max_tokens=1024),
        score_blocks=ScoreBlocksConfig(space=space, max_sequences=48, max_tokens=1024, batch_tokens=8192),
        measure_costs=MeasureCostsConfig(space=space, workloads=(long, short), repeats=3),
        search_architecture=SearchArchitectureConfig(
            limits={
                "long": Limits(memory_ratio=0.45, throughput_ratio=1.1),
                "short": Limits(memory_ratio=0.85),
            },
            max_experts_ratio=0.7,
            min_windowed_share=1 / 3,
        ),
        prune_model=PruneModelConfig(),
        evaluate=EvaluateConfig(problems_per_task=80, max_new_tokens=128),
        benchmark=BenchmarkConfig(batch_sizes=(1, 4, 16), input_tokens=(128, 2048), workloads=(long, short), repeats=3),
        report=ReportConfig(title="The tiny reasoner, compressed on a CPU"),
    )


RECIPES: dict[str, Callable[[], SearchRecipe]] = {"tiny_cpu": tiny_cpu}
"""Recipes by the name that the command line takes."""

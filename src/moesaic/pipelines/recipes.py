"""Complete, named values for the pipelines: what to build. Where (paths, stores, devices) comes from outside."""

from collections.abc import Callable
from pathlib import Path

from moesaic.core.errors import ConfigError
from moesaic.costs.workload import Workload
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.measure.benchmark.stage import BenchmarkConfig
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig, SweptWorkload
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.measure.report.stage import ReportConfig
from moesaic.pipelines.recipe import Recipe
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.reinforce.stage import ReinforceConfig, RewardConfig
from moesaic.recover.training import OptimizerConfig
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.space import SearchSpace


def tiny_cpu() -> Recipe:
    """The tiny reasoner of ``examples/`` on two CPU cores, search and recovery, in minutes."""
    space = SearchSpace(expert_counts=(16, 14, 12, 10, 8, 6, 4), windows=(256, 128, 64, 32))
    long = Workload(name="long", input_tokens=2048, output_tokens=64, concurrency=4)
    short = Workload(name="short", input_tokens=128, output_tokens=128, concurrency=4)
    search = SearchArchitectureConfig(
        limits={"long": Limits(memory_ratio=0.45, throughput_ratio=1.1), "short": Limits(memory_ratio=0.85)},
        max_experts_ratio=0.65,
        min_windowed_share=1 / 3,
        random_seeds=(0,),
    )
    distill = DistillConfig(
        balance="trace",
        sequence_tokens=1024,
        rows_per_step=8,
        rows_per_forward=8,
        steps=60,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10, max_gradient_norm=0.3),
        evaluate_every_steps=20,
        checkpoint_every_steps=20,
        precision="float32",
    )
    policy = ReinforceConfig(
        name="high",
        efforts=("high",),
        steps=10,
        prompts_per_step=48,
        generations_per_prompt=8,
        replies_per_forward=384,
        max_new_tokens=96,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=3),
        checkpoint_every_steps=4,
        precision="float32",
    )
    mixed = policy.model_copy(
        update={
            "name": "mixed",
            "efforts": ("low", "low", "medium", "high"),
            "min_parent_accuracy": 0.85,
            "prompts_per_step": 144,
            "rewards": RewardConfig(length=0.2),
            "optimizer": OptimizerConfig(learning_rate=8e-4, warmup_steps=5, final_learning_rate_ratio=0.3),
            "seed": 1,
        }
    )
    return Recipe(
        rank_experts=RankExpertsConfig(max_sequences=128, max_tokens=1024),
        score_blocks=ScoreBlocksConfig(space=space, metric="kl", max_sequences=48, max_tokens=1024, batch_tokens=8192),
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
        earlier_distill=distill.model_copy(update={"steps": 40}),
        policies=(policy, mixed),
        average_checkpoints=AverageCheckpointsConfig(weights=(2, 1)),
        calibrate_kv=CalibrateKvConfig(max_sequences=64, max_tokens=1024, precision="float32"),
        evaluate=EvaluateConfig(problems_per_task=50, max_new_tokens=128, kv_cache="bf16"),
        benchmark=BenchmarkConfig(batch_sizes=(1, 4, 16), input_tokens=(128, 2048), workloads=(long, short), repeats=3),
        benchmark_serving=BenchmarkServingConfig(
            workloads=(
                SweptWorkload(name="long", input_tokens=2048, output_tokens=64, concurrencies=(1, 4)),
                SweptWorkload(name="short", input_tokens=128, output_tokens=128, concurrencies=(1, 4)),
            ),
            requests_per_user=3,
            repeats=2,
        ),
        report=ReportConfig(title="The tiny reasoner, compressed on a CPU"),
        promote=PromoteConfig(model="tiny-reasoner"),
    )


def tiny_cpu_full() -> Recipe:
    """The same with more of everything: the committed record is of this one."""
    demo = tiny_cpu()
    return demo.model_copy(
        update={
            "generate_traces": demo.generate_traces.model_copy(update={"max_prompts": 4200}),
            "distill": demo.distill.model_copy(update={"steps": 200}),
            "policies": (
                demo.policies[0],
                demo.policies[1].model_copy(update={"steps": 60}),
            ),
            "evaluate": demo.evaluate.model_copy(update={"problems_per_task": 150}),
            "search_architecture": demo.search_architecture.model_copy(update={"random_seeds": (0, 1, 2)}),
        }
    )


def tiny_cpu_fast() -> Recipe:
    """The same with less of everything, to see that it works."""
    full = tiny_cpu()
    optimizer = full.distill.optimizer.model_copy(update={"warmup_steps": 2})
    distill = full.distill.model_copy(update={"steps": 6, "optimizer": optimizer})
    return full.model_copy(
        update={
            "rank_experts": full.rank_experts.model_copy(update={"max_sequences": 32}),
            "score_blocks": full.score_blocks.model_copy(update={"max_sequences": 4}),
            "measure_costs": full.measure_costs.model_copy(update={"repeats": 1}),
            "generate_traces": full.generate_traces.model_copy(update={"max_prompts": 120}),
            "distill": distill,
            "earlier_distill": distill,
            "policies": tuple(
                policy.model_copy(update={"steps": 2, "prompts_per_step": 24, "replies_per_forward": 192})
                for policy in full.policies
            ),
            "evaluate": full.evaluate.model_copy(update={"problems_per_task": 5}),
            "search_architecture": full.search_architecture.model_copy(update={"random_seeds": ()}),
            "benchmark": full.benchmark.model_copy(update={"batch_sizes": (4,), "workloads": (), "repeats": 1}),
            "benchmark_serving": full.benchmark_serving.model_copy(
                update={
                    "requests_per_user": 2,
                    "workloads": (full.benchmark_serving.workloads[0].model_copy(update={"concurrencies": (4,)}),),
                }
            ),
        }
    )


def in_two_rounds(recipe: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """The same with a gentler round of pruning and distillation before it."""
    return lambda: recipe().model_copy(update={"rounds": 2})


def gpt_oss_120b_h100x8() -> Recipe:
    """gpt-oss-120b for a node of eight H100 (the paper's setting): 64K and 4K workloads, FP8 cache, 84B tokens of KD.

    Limits are what the released child reaches by the cost model; see ``benchmarks/h100_search.py`` for the frontier.
    """
    space = SearchSpace(expert_counts=(128, 112, 96, 80, 64, 48, 32, 16), windows=(8192,), expert_parallel_size=8)
    costs = _h100_costs(space, num_gpus=8, long_requests=256, short_requests=512)
    search = SearchArchitectureConfig(
        limits={"long": Limits(memory_ratio=0.65, throughput_ratio=1.45), "short": Limits(throughput_ratio=1.04)},
        max_experts_ratio=0.75,
        max_layouts=3,
        kv_group_size=9,
        relative_gap=1e-4,
        min_windowed_share=0.4,
    )
    earlier = {"long": Limits(memory_ratio=0.8, throughput_ratio=1.2)}
    return _gpt_oss_h100(
        "gpt-oss-120b for eight H100",
        costs,
        search,
        search.model_copy(update={"limits": earlier, "max_experts_ratio": 0.875, "min_windowed_share": 0.2}),
        distill_steps=20_027,
        model="gpt-oss-120b",
    )


def gpt_oss_120b_h100x1() -> Recipe:
    """gpt-oss-120b for serving from one H100: what fits decides. Recovery is the same and needs the same node."""
    space = SearchSpace(expert_counts=(128, 112, 96, 80, 64, 48, 32, 16), windows=(8192,), expert_parallel_size=8)
    costs = _h100_costs(space, num_gpus=1, long_requests=16, short_requests=128)
    search = SearchArchitectureConfig(
        limits={
            "long": Limits(memory_mib=68_600, throughput_ratio=1.3),
            "short": Limits(memory_mib=68_600, throughput_ratio=1.15),
        },
        max_layouts=3,
        kv_group_size=9,
        relative_gap=1e-4,
    )
    earlier = {"long": Limits(memory_mib=80_000), "short": Limits(memory_mib=80_000)}
    return _gpt_oss_h100(
        "gpt-oss-120b for one H100",
        costs,
        search,
        search.model_copy(update={"limits": earlier}),
        distill_steps=20_027,
        model="gpt-oss-120b-one-gpu",
    )


def gpt_oss_20b_h100x1() -> Recipe:
    """gpt-oss-20b for one H100: a quarter fewer experts, half the full layers windowed, a tenth of the KD tokens."""
    space = SearchSpace(expert_counts=(32, 28, 24, 20, 16, 12, 8), windows=(8192,), expert_parallel_size=4)
    costs = _h100_costs(space, num_gpus=1, long_requests=32, short_requests=256)
    search = SearchArchitectureConfig(
        limits={"long": Limits(memory_ratio=0.7, throughput_ratio=1.4), "short": Limits(throughput_ratio=1.03)},
        max_experts_ratio=0.75,
        max_layouts=3,
        kv_group_size=6,
        relative_gap=1e-4,
        min_windowed_share=0.5,
    )
    earlier = {"long": Limits(memory_ratio=0.85, throughput_ratio=1.2)}
    return _gpt_oss_h100(
        "gpt-oss-20b for one H100",
        costs,
        search,
        search.model_copy(update={"limits": earlier, "max_experts_ratio": 0.875, "min_windowed_share": 0.25}),
        distill_steps=2003,
        model="gpt-oss-20b",
    )


def _h100_costs(space: SearchSpace, num_gpus: int, long_requests: int, short_requests: int) -> MeasureCostsConfig:
    """Both of the paper's workloads, modelled with the H100 table and an FP8 cache."""
    long = Workload(name="long", input_tokens=65_536, output_tokens=65_536, concurrency=long_requests)
    short = Workload(name="short", input_tokens=4096, output_tokens=4096, concurrency=short_requests)
    return MeasureCostsConfig(
        space=space,
        workloads=(long, short),
        source="model",
        hardware="h100",
        num_gpus=num_gpus,
        kv_cache="fp8",
        precision="bfloat16",
    )


def _gpt_oss_h100(
    title: str,
    costs: MeasureCostsConfig,
    search: SearchArchitectureConfig,
    earlier_search: SearchArchitectureConfig,
    distill_steps: int,
    model: str,
) -> Recipe:
    """What the recipes for gpt-oss on H100 share.

    Distillation sees rows of 128K tokens, 32 a step (20,027 steps are 84B tokens), of replies at medium and high
    effort, as in the paper; the low ones measure how long the parent's replies are, for the mixed policy.
    """
    export = ExportEngineConfig(
        target="tensorrt_llm",
        max_batch_size=2 * max(workload.concurrency for workload in costs.workloads),
        tensor_parallel_size=costs.num_gpus,
        expert_parallel_size=costs.num_gpus,
        compare_outputs=False,
    )
    in_bf16 = export.model_copy(update={"kv_cache": "bf16"})
    distill = DistillConfig(
        efforts=("medium", "high"),
        sequence_tokens=131_072,
        rows_per_step=32,
        steps=distill_steps,
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=200),
        evaluate_every_steps=500,
        checkpoint_every_steps=250,
    )
    policy = ReinforceConfig(
        engine="nemo_rl",
        steps=300,
        prompts_per_step=128,
        generations_per_prompt=16,
        replies_per_forward=1,
        batch_size=1024,
        max_new_tokens=32_768,
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=10),
        checkpoint_every_steps=10,
    )
    return Recipe(
        rank_experts=RankExpertsConfig(max_sequences=128, max_tokens=8192, batch_tokens=65_536, precision="bfloat16"),
        score_blocks=ScoreBlocksConfig(
            space=costs.space,
            max_sequences=64,
            max_tokens=32_768,
            batch_tokens=131_072,
            variants_per_batch=4,
            precision="bfloat16",
        ),
        measure_costs=costs,
        search_architecture=search,
        earlier_search_architecture=earlier_search,
        generate_traces=GenerateTracesConfig(
            engine="tensorrt_llm",
            bundle=in_bf16,
            max_new_tokens=65_536,
            batch_size=in_bf16.max_batch_size,
            temperature=1.0,
            held_out_share=0.01,
            reply_timeout_s=36_000,
        ),
        distill_blocks=DistillBlocksConfig(precision="bfloat16"),
        distill=distill,
        earlier_distill=distill.model_copy(update={"steps": distill_steps // 10}),
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
        calibrate_kv=CalibrateKvConfig(max_sequences=128, max_tokens=8192, batch_tokens=65_536),
        evaluate=EvaluateConfig(
            engine="tensorrt_llm",
            bundle=in_bf16,
            efforts=("low", "medium", "high"),
            problems_per_task=500,
            max_new_tokens=65_536,
            batch_size=in_bf16.max_batch_size,
            temperature=1.0,
            kv_cache="bf16",
            reply_timeout_s=36_000,
        ),
        benchmark=BenchmarkConfig(
            batch_sizes=(1, 16, 64),
            input_tokens=(1024, 16_384),
            output_tokens=64,
            repeats=5,
            precision="bfloat16",
            by_block=True,
        ),
        export_engine=export,
        benchmark_serving=BenchmarkServingConfig(
            engine="tensorrt_llm",
            workloads=tuple(_swept(workload) for workload in costs.workloads),
            requests_per_user=2,
            parent_kv_cache="fp8",
            child_kv_cache="fp8",
            precision="bfloat16",
            point_timeout_s=36_000,
        ),
        report=ReportConfig(title=title),
        promote=PromoteConfig(model=model, min_retention={"low": 1.0, "medium": 0.99, "high": 0.99}),
    )


def _swept(workload: Workload) -> SweptWorkload:
    """A workload of the search, from one user to twice as many as it was searched for, in powers of four."""
    most = 2 * workload.concurrency
    return SweptWorkload(
        name=workload.name,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        concurrencies=tuple(4**power for power in range(most.bit_length()) if 4**power <= most),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny_cpu": tiny_cpu,
    "tiny_cpu_full": tiny_cpu_full,
    "tiny_cpu_fast": tiny_cpu_fast,
    "tiny_cpu_two_rounds": in_two_rounds(tiny_cpu),
    "tiny_cpu_two_rounds_fast": in_two_rounds(tiny_cpu_fast),
    "gpt_oss_120b_h100x8": gpt_oss_120b_h100x8,
    "gpt_oss_120b_h100x1": gpt_oss_120b_h100x1,
    "gpt_oss_20b_h100x1": gpt_oss_20b_h100x1,
}
"""Recipes by the name that the command line takes."""


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, or the one in a file.

    Raises:
        ConfigError: if there is none, naming those there are; for a file that is no recipe.
    """
    if Path(name).is_file():
        return Recipe.parse(Path(name).read_text())
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}, or give a file")
    return RECIPES[name]()

"""Complete, named values for the pipelines: what to build. Where (paths, stores, devices) comes from outside."""

from collections.abc import Callable
from pathlib import Path

from moesaic.core.config import Effort
from moesaic.core.errors import ConfigError
from moesaic.core.json_text import parse_json, read_text
from moesaic.costs.workload import Workload
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig
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
from moesaic.recover.fit_routers.stage import FitRoutersConfig
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.reinforce.stage import NemoRlConfig, ReinforceConfig, RewardConfig
from moesaic.recover.training import OptimizerConfig
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.space import SearchSpace

_MEASURED = 3
"""Assemblies that are run whole: the search's choice, greedy and uniform, or a near one where two of them are equal.

``benchmarks/results/refinement_*`` has what 16 bring on three draws of the tiny reasoner's calibration sets: before any
training +0.8 points [0.4, 1.2] over the search's choice, as much as measuring the 15 that follow it by their sums; on
tokens that no choice had seen the damage was less in one draw, equal in one and more in one. So recipes measure and do
not refine.
"""

_FEW_BASELINES = ("uniform", "uniform_reap", "greedy")
"""Where every evaluation counts."""


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
    gentler = {"long": Limits(memory_ratio=0.7), "short": Limits(memory_ratio=0.95)}
    scores = ScoreBlocksConfig(space=space, metric="kl", max_sequences=48, max_tokens=1024, batch_tokens=8192)
    distill = _tiny_distill()
    margins: dict[Effort, float] = {"low": 5.0, "medium": 4.0, "high": 3.0}
    return Recipe(
        rank_experts=RankExpertsConfig(max_sequences=128, max_tokens=1024),
        score_blocks=scores,
        measure_costs=MeasureCostsConfig(space=space, workloads=(long, short), repeats=3),
        search_architecture=search,
        earlier_search_architecture=search.but(limits=gentler, max_experts_ratio=0.85, min_windowed_share=0.0),
        refine_architecture=RefineArchitectureConfig.like(scores, evaluations=_MEASURED),
        generate_traces=GenerateTracesConfig(max_prompts=1200, max_new_tokens=128),
        distill_blocks=DistillBlocksConfig(),
        distill=distill,
        earlier_distill=distill.but(steps=40),
        policies=_tiny_policies(),
        average_checkpoints=AverageCheckpointsConfig(weights=(2, 1)),
        calibrate_kv=CalibrateKvConfig(max_sequences=64, max_tokens=1024, precision="float32"),
        evaluate=EvaluateConfig(problems_per_task=50, max_new_tokens=128, kv_cache="bf16"),
        benchmark=BenchmarkConfig(batch_sizes=(1, 4, 16), input_tokens=(128, 2048), workloads=(long, short), repeats=3),
        benchmark_serving=BenchmarkServingConfig(
            workloads=(
                SweptWorkload(name="long", input_tokens=2048, output_tokens=64, concurrencies=(1, 4)),
                SweptWorkload(name="short", input_tokens=128, output_tokens=128, concurrencies=(1, 4)),
            ),
            engine="vllm",
            requests_per_user=3,
            repeats=2,
        ),
        export_engine=ExportEngineConfig(target="vllm", kv_cache="bf16", max_batch_size=16, max_num_tokens=2048),
        validate_bundle=ValidateBundleConfig(prompts_per_effort=50),
        report=ReportConfig(title="The tiny reasoner, compressed on a CPU"),
        promote=PromoteConfig(model="tiny-reasoner", margin_points=margins, kv_margin_points=margins),
    )


def _tiny_distill() -> DistillConfig:
    return DistillConfig(
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


def _tiny_policies() -> tuple[ReinforceConfig, ReinforceConfig]:
    """One of high effort alone, and one of mixed efforts with a price on length, as in the paper."""
    high = ReinforceConfig(
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
    mixed = high.but(
        name="mixed",
        efforts=("low", "low", "medium", "high"),
        min_parent_accuracy=0.85,
        prompts_per_step=144,
        rewards=RewardConfig(length=0.2),
        optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=5, final_learning_rate_ratio=0.3),
        seed=1,
    )
    return high, mixed


def tiny_cpu_full() -> Recipe:
    """The same with more of everything: the committed record is of this one."""
    demo = tiny_cpu()
    high, mixed = demo.policies
    return demo.but(
        generate_traces={"max_prompts": 4200},
        distill={"steps": 200},
        policies=(high, mixed.but(steps=60)),
        evaluate={"problems_per_task": 150},
        search_architecture={"random_seeds": (0, 1, 2)},
        benchmark_serving={"repeats": 3},
        validate_bundle={"prompts_per_effort": 500},
    )


def tiny_cpu_demo() -> Recipe:
    """What ``make demo`` runs: the same without the control, and with less of what only narrows an interval."""
    whole = tiny_cpu()
    high, mixed = whole.policies
    return whole.but(
        baseline=None,
        search_architecture={"baselines": ("uniform", "greedy"), "random_seeds": ()},
        measure_costs={"repeats": 2},
        policies=(high.but(steps=6), mixed.but(steps=6, prompts_per_step=96)),
        benchmark={"batch_sizes": (1, 16), "input_tokens": (2048,), "repeats": 2},
        benchmark_serving={
            "workloads": tuple(each.but(concurrencies=(4,)) for each in whole.benchmark_serving.workloads),
            "more_repeats": 0,
        },
    )


def tiny_cpu_demo_fast() -> Recipe:
    """What ``make demo FAST=1`` runs."""
    return tiny_cpu_fast().but(baseline=None)


def tiny_cpu_fast() -> Recipe:
    """The same with less of everything, to see that it works; served by ``moesaic serve``, which is up at once."""
    demo = tiny_cpu().served_by("moesaic")
    few_steps = {"steps": 6, "optimizer": {"warmup_steps": 2}}
    long_contexts = demo.benchmark_serving.workloads[0]
    return demo.but(
        rank_experts={"max_sequences": 32},
        score_blocks={"max_sequences": 4},
        refine_architecture={"max_sequences": 4},
        measure_costs={"repeats": 1},
        generate_traces={"max_prompts": 120},
        distill=few_steps,
        earlier_distill={"steps": 6, "optimizer": {"warmup_steps": 2}},
        policies=tuple(one.but(steps=2, prompts_per_step=24, replies_per_forward=192) for one in demo.policies),
        evaluate={"problems_per_task": 5},
        search_architecture={"baselines": _FEW_BASELINES, "random_seeds": ()},
        benchmark={"batch_sizes": (4,), "workloads": (), "repeats": 1},
        benchmark_serving={"requests_per_user": 2, "workloads": (long_contexts.but(concurrencies=(4,)),)},
    )


def reasoner_cpu() -> Recipe:
    """The reasoner of ``examples/`` on two CPU cores: it has room above and below, so that recovery can win or lose.

    Replies are sampled at temperature 1, as gpt-oss is asked. Distillation is at medium and high effort, as in paper A:
    at low effort a pruned child sometimes thinks before it answers, and a policy can learn where that pays.
    """
    demo = tiny_cpu()
    space = SearchSpace(expert_counts=(24, 21, 18, 15, 12, 9, 6), windows=(256, 128, 64, 32))
    return demo.but(
        score_blocks={"space": space, "max_sequences": 24},
        measure_costs={"space": space},
        search_architecture={"max_experts_ratio": 0.625},
        refine_architecture={"max_sequences": 24},
        generate_traces={"max_new_tokens": 192},
        distill={"efforts": ("medium", "high")},
        policies=_reasoner_policies(),
        average_checkpoints={"weights": (1, 1)},
        evaluate={"max_new_tokens": 192, "temperature": 1.0},
        report={"title": "The reasoner, compressed on a CPU"},
        promote={"model": "reasoner"},
    )


def _reasoner_policies() -> tuple[ReinforceConfig, ReinforceConfig]:
    """One of high effort, on what the parent can do, and one of low effort with a price on length.

    Chosen on validation problems; what they gain on others is in ``docs/experiment.md``.
    """
    high, mixed = _tiny_policies()
    return (
        high.but(
            steps=6,
            min_parent_accuracy=0.6,
            replies_per_forward=96,
            max_new_tokens=192,
            optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2),
        ),
        mixed.but(
            name="low",
            efforts=("low",),
            min_parent_accuracy=0.0,
            steps=24,
            prompts_per_step=52,
            replies_per_forward=104,
            max_new_tokens=128,
            scale_rewards=False,
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=3, final_learning_rate_ratio=0.3),
        ),
    )


def in_two_rounds(recipe: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """The same with a gentler round of pruning and distillation before it."""
    return lambda: recipe().but(rounds=2)


def on_a_budget(recipe: Callable[[], Recipe], distill_steps: int, num_prompts: int) -> Callable[[], Recipe]:
    """The same with one policy, no control, and less of everything that is paid by the token.

    What fewer tokens of distillation cost is known of paper B alone, on a dense model: 98.8 % of the quality after 3.7B
    of 45B tokens. A prompt gives about 64K tokens to distil, with replies of medium and high effort. The gate asks no
    more than 100 problems of a task can answer: a margin of 6 points.
    """
    margins: dict[Effort, float] = {"low": 6.0, "medium": 6.0, "high": 6.0}

    def reduced() -> Recipe:
        whole = recipe()
        return whole.but(
            baseline=None,
            search_architecture={"baselines": _FEW_BASELINES},
            policies=(whole.policies[0].but(steps=100, max_new_tokens=32_768),),
            generate_traces={"max_prompts": num_prompts},
            distill={
                "steps": distill_steps,
                "optimizer": {"warmup_steps": min(200, distill_steps // 10)},
                "evaluate_every_steps": min(500, distill_steps),
            },
            evaluate={"problems_per_task": 100},
            benchmark_serving={"requests_per_user": 1},
            promote={"margin_points": margins, "kv_margin_points": margins},
        )

    return reduced


def gpt_oss_120b_h100x8() -> Recipe:
    """gpt-oss-120b for a node of eight H100 (the paper's setting): 64K and 4K workloads, FP8 cache, 84B tokens of KD.

    Limits are the paper's results as far as the cost model reproduces them (``benchmarks/cost_model.py``). It published
    throughput at each model's own best number of requests: 1.63 at 64K + 64K. The parent is modelled at 7,097 tokens/s
    with the 285 requests it holds; 11,400 are 1.61 times that, from 480 requests at once, which the released layout
    holds by the average of their lives. Memory is the published cache of about 0.6, and room to round. At 4K + 4K the
    model explains 1.05 of the published 1.22, so no more than that can be asked of it.
    """
    costs = _h100_costs(_120B_SPACE, num_gpus=8, long_requests=480, short_requests=512)
    search = SearchArchitectureConfig(
        limits={
            "long": Limits(memory_ratio=0.61, throughput_tokens_per_s=11_400),
            "short": Limits(throughput_ratio=1.05),
        },
        max_layouts=3,
        relative_gap=1e-4,
    )
    gentler = {"long": Limits(memory_ratio=0.8, throughput_ratio=1.2), "short": Limits(throughput_ratio=1.025)}
    recipe = _gpt_oss_h100(costs, search, search.but(limits=gentler), distill_steps=20_027)
    return _stretched(recipe).but(report={"title": "gpt-oss-120b for eight H100"}, promote={"model": "gpt-oss-120b"})


def gpt_oss_120b_h100x1() -> Recipe:
    """gpt-oss-120b for serving from one H100: what fits decides. Recovery is the same and needs the same node.

    The paper published 2.82 at 64K + 64K and 2.44 at 4K + 4K, each model at its own best number of requests. The parent
    is modelled at 295 tokens/s with the 2 long requests it holds, and at 1,873 with 46 short ones. The limits are 2.66
    and 2.27 times that, with as many requests as the released layout holds at once when all are at their full length.
    """
    costs = _h100_costs(_120B_SPACE, num_gpus=1, long_requests=15, short_requests=140)
    search = SearchArchitectureConfig(
        limits={
            "long": Limits(memory_mib=68_600, throughput_tokens_per_s=785),
            "short": Limits(memory_mib=68_600, throughput_tokens_per_s=4250),
        },
        max_layouts=3,
        relative_gap=1e-4,
    )
    earlier = search.but(limits={"long": Limits(memory_mib=80_000), "short": Limits(memory_mib=80_000)})
    recipe = _gpt_oss_h100(costs, search, earlier, distill_steps=20_027)
    return _stretched(recipe).but(
        report={"title": "gpt-oss-120b for one H100"}, promote={"model": "gpt-oss-120b-one-gpu"}
    )


def gpt_oss_20b_h100x1() -> Recipe:
    """gpt-oss-20b for one H100, with a tenth of the KD tokens. No child of it is published: the limits are ours."""
    space = SearchSpace(expert_counts=(32, 28, 24, 20, 16, 12, 8), windows=(8192,), expert_parallel_size=4)
    costs = _h100_costs(space, num_gpus=1, long_requests=32, short_requests=256)
    search = SearchArchitectureConfig(
        limits={"long": Limits(memory_ratio=0.7, throughput_ratio=1.4), "short": Limits(throughput_ratio=1.03)},
        max_layouts=3,
        relative_gap=1e-4,
    )
    gentler = {"long": Limits(memory_ratio=0.85, throughput_ratio=1.2)}
    recipe = _gpt_oss_h100(costs, search, search.but(limits=gentler), distill_steps=2003)
    return recipe.but(report={"title": "gpt-oss-20b for one H100"}, promote={"model": "gpt-oss-20b"})


def _stretched(recipe: Recipe) -> Recipe:
    """With the released child's YaRN factor, in the child and in the control (paper A; the parent's is 32)."""
    return recipe.but(prune_model={"yarn_factor": 56.0}, baseline={"yarn_factor": 56.0})


_120B_SPACE = SearchSpace(expert_counts=(128, 112, 96, 80, 64, 48, 32, 16), windows=(8192,), expert_parallel_size=8)


def _h100_costs(space: SearchSpace, num_gpus: int, long_requests: int, short_requests: int) -> MeasureCostsConfig:
    """Both of the paper's workloads, modelled with the H100 table, for the engine and parallelism of the export."""
    long = Workload(name="long", input_tokens=65_536, output_tokens=65_536, concurrency=long_requests)
    short = Workload(name="short", input_tokens=4096, output_tokens=4096, concurrency=short_requests)
    return MeasureCostsConfig(
        space=space,
        workloads=(long, short),
        source="model",
        hardware="h100",
        num_gpus=num_gpus,
        expert_parallel=num_gpus > 1,
        engine="tensorrt_llm",
        kv_cache="fp8",
        precision="bfloat16",
    )


def _gpt_oss_h100(
    costs: MeasureCostsConfig,
    search: SearchArchitectureConfig,
    earlier_search: SearchArchitectureConfig,
    distill_steps: int,
) -> Recipe:
    """What the recipes for gpt-oss on H100 share."""
    export = ExportEngineConfig(
        target="tensorrt_llm",
        max_batch_size=2 * max(workload.concurrency for workload in costs.workloads),
        tensor_parallel_size=costs.num_gpus,
        expert_parallel_size=costs.num_gpus if costs.expert_parallel else 1,
        compare_outputs=False,
    )
    scores = ScoreBlocksConfig(
        space=costs.space,
        metric="kl",
        max_sequences=64,
        max_tokens=8192,
        max_long_tokens=131_072,
        batch_tokens=262_144,
        variants_per_batch=2,
        precision="bfloat16",
    )
    distill = _gpt_oss_distill(distill_steps)
    return Recipe(
        rank_experts=RankExpertsConfig(max_sequences=128, max_tokens=8192, batch_tokens=65_536, precision="bfloat16"),
        score_blocks=scores,
        measure_costs=costs,
        search_architecture=search,
        earlier_search_architecture=earlier_search,
        refine_architecture=RefineArchitectureConfig.like(scores, evaluations=_MEASURED).but(assemblies_per_round=2),
        generate_traces=_gpt_oss_traces(export),
        fit_routers=FitRoutersConfig(precision="bfloat16"),
        distill_blocks=DistillBlocksConfig(precision="bfloat16"),
        distill=distill,
        earlier_distill=distill.but(steps=distill_steps // 10),
        policies=_gpt_oss_policies(costs.space.expert_parallel_size),
        calibrate_kv=CalibrateKvConfig(max_sequences=128, max_tokens=8192, batch_tokens=65_536),
        evaluate=_gpt_oss_evaluation(export),
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
        report=ReportConfig(),
    )


def _gpt_oss_traces(export: ExportEngineConfig) -> GenerateTracesConfig:
    """Replies at every effort; the low ones measure how long the parent's replies are, for the mixed policy."""
    return GenerateTracesConfig(
        engine="tensorrt_llm",
        bundle=export.but(kv_cache="bf16"),
        max_new_tokens=65_536,
        batch_size=export.max_batch_size,
        temperature=1.0,
        held_out_share=0.01,
        reply_timeout_s=36_000,
    )


def _gpt_oss_distill(steps: int) -> DistillConfig:
    """Rows of 128K tokens, 32 a step (20,027 steps are 84B tokens), of replies at medium and high effort (paper A)."""
    return DistillConfig(
        efforts=("medium", "high"),
        sequence_tokens=131_072,
        rows_per_step=32,
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=200),
        evaluate_every_steps=500,
        checkpoint_every_steps=250,
    )


def _gpt_oss_policies(gpus_of_a_model: int) -> tuple[ReinforceConfig, ReinforceConfig]:
    """Rollouts as long as evaluation lets replies be; vLLM holds the policy on as many GPUs as share its experts."""
    high = ReinforceConfig(
        engine="nemo_rl",
        name="high",
        efforts=("high",),
        steps=300,
        prompts_per_step=128,
        generations_per_prompt=16,
        replies_per_forward=1,
        batch_size=1024,
        max_new_tokens=65_536,
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=10),
        checkpoint_every_steps=10,
        nemo_rl=NemoRlConfig(
            expert_parallel=gpus_of_a_model,
            generation_tensor_parallel=gpus_of_a_model,
            generation_expert_parallel=gpus_of_a_model,
        ),
    )
    mixed = high.but(
        name="mixed",
        efforts=("low", "medium", "high"),
        rewards=RewardConfig(length=0.5),
        scale_rewards=False,
        seed=1,
    )
    return high, mixed


def _gpt_oss_evaluation(export: ExportEngineConfig) -> EvaluateConfig:
    """Two replies to each problem: of 4000 problems they answer the gate's margins of 3 points, one reply would not."""
    return EvaluateConfig(
        engine="tensorrt_llm",
        bundle=export.but(kv_cache="bf16"),
        efforts=("low", "medium", "high"),
        problems_per_task=500,
        epochs=2,
        max_new_tokens=65_536,
        batch_size=export.max_batch_size,
        temperature=1.0,
        kv_cache="bf16",
        reply_timeout_s=36_000,
    )


def _swept(workload: Workload) -> SweptWorkload:
    """A workload of the search, from one user to twice as many as it was searched for, in powers of two.

    Both models are compared at their own best number of users: one H100 holds 2 long requests of the parent.
    """
    most = 2 * workload.concurrency
    return SweptWorkload(
        name=workload.name,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        concurrencies=tuple(2**power for power in range(most.bit_length()) if 2**power <= most),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny_cpu": tiny_cpu,
    "tiny_cpu_full": tiny_cpu_full,
    "tiny_cpu_fast": tiny_cpu_fast,
    "tiny_cpu_demo": tiny_cpu_demo,
    "tiny_cpu_demo_fast": tiny_cpu_demo_fast,
    "reasoner_cpu": reasoner_cpu,
    "tiny_cpu_two_rounds": in_two_rounds(tiny_cpu),
    "tiny_cpu_two_rounds_fast": in_two_rounds(tiny_cpu_fast),
    "gpt_oss_120b_h100x8": gpt_oss_120b_h100x8,
    "gpt_oss_120b_h100x1": gpt_oss_120b_h100x1,
    "gpt_oss_120b_h100x8_8b_tokens": on_a_budget(gpt_oss_120b_h100x8, 2003, num_prompts=100_000),
    "gpt_oss_120b_h100x8_1b_tokens": on_a_budget(gpt_oss_120b_h100x8, 239, num_prompts=16_000),
    "gpt_oss_20b_h100x1": gpt_oss_20b_h100x1,
    "gpt_oss_20b_h100x1_1b_tokens": on_a_budget(gpt_oss_20b_h100x1, 239, num_prompts=16_000),
}
"""Recipes by the name that the command line takes."""


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, or the one in a file.

    Raises:
        ConfigError: if there is none, naming those there are; for a file that is no recipe.
        ArtifactError: for a file that is no JSON, or names a key twice.
    """
    if Path(name).is_file():
        text = read_text(Path(name))
        parse_json(text.encode(), name)
        return Recipe.parse(text)
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}, or give a file")
    return RECIPES[name]()

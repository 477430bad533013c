"""Plans: a tiny model's numbers by hand, plausible ones for gpt-oss-120b, and pipelines read from their YAML."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.command_line.main import main
from moesaic.command_line.planning_commands import read_tasks
from moesaic.core.config import Config
from moesaic.core.errors import ConfigError, InfeasibleError
from moesaic.costs.facts import Assumed, Facts, PipelineTask
from moesaic.costs.generation import Requests, generation
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.times import forward_ms, learn_ms
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig, SweptWorkload
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import (
    GPT_OSS,
    GPT_OSS_20B_BLOCKS,
    GPT_OSS_120B,
    GPT_OSS_120B_BLOCKS,
    GPT_OSS_PUZZLE_88B_BLOCKS,
)
from moesaic.models.peak import Peak
from moesaic.pipelines import compiled, find_pipeline
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.planning import Planned, assume_child, plan, totals
from moesaic.platform.planning.devices import check_devices
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.recover.distill import needs as distill_needs
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.score_blocks import scoring
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.search_architecture.stage import SearchArchitectureConfig
from moesaic.search.space import SearchSpace

GIB = 2**30
H100 = read_table("h100")
INGEST = IngestConfig(parent="a", calibration_short="b", calibration_long="c", prompts="d", tests="e")

SHAPE = ModelShape(
    family=GPT_OSS,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=64,
    max_positions=512,
)
PARENT = Architecture.of(Block(8, 2, 64, None if layer % 2 else 8) for layer in range(4))
CHILD = PARENT.replace(1, Block(4, 2, 64, 16)).replace(3, Block(4, 2, 64))
TINY = Facts(SHAPE, PARENT, True, CHILD, None, Assumed(num_prompts=10, num_tasks=2, prompt_tokens=5, reply_share=0.5))

EXPERT_BYTES = 3 * 64 * 64 * 17 // 32 + 2 * (2 * 64 + 64)
"""Packed gate_up and down, 4.25 bits a value, and their BF16 biases."""
ROUTER_BYTES = 2 * (64 + 1)
ATTENTION_BYTES = 2 * (2 * 64 + 4 + (64 * 64 + 64) + 2 * (32 * 64 + 32) + (64 * 64 + 64))
"""Norms, sinks, and the projections q, k, v, o with their biases."""
OUTER_BYTES = 2 * (64 * 64 + 64 + 64 * 64)
PARENT_BYTES = 4 * (8 * (EXPERT_BYTES + ROUTER_BYTES) + ATTENTION_BYTES) + OUTER_BYTES
CHILD_BYTES = PARENT_BYTES - 8 * (EXPERT_BYTES + ROUTER_BYTES)
OUTSIDE_EXPERTS = 4 * ATTENTION_BYTES + (2 * 8 + 2 * 4) * ROUTER_BYTES + OUTER_BYTES
"""Of the child: what recovery writes anew."""


def task(name: str, config: Config, *models: str) -> PipelineTask:
    return PipelineTask(name, name.rstrip("123"), config, models)


def run(*tasks: PipelineTask, facts: Facts = TINY) -> dict[str, Planned]:
    whole = [task("ingest", INGEST), *tasks]
    return {one.task.name: one for one in plan(whole, facts)}


def test_the_numbers_by_hand_are_those_of_a_checkpoint(tiny_checkpoint: Checkpoint) -> None:
    found = sum(tiny_checkpoint.tensor(name).nbytes for name in tiny_checkpoint.files)
    assert tiny_checkpoint.shape == SHAPE
    assert found == PARENT_BYTES


def test_ranking_reads_all_but_the_head_once() -> None:
    config = RankExpertsConfig(max_sequences=3, max_tokens=7)
    needs = run(task("rank_experts", config, "ingest"))["rank_experts"].needs
    assert needs.read_bytes == PARENT_BYTES - 2 * 64 * 64
    layer_parameters = 8 * (3 * 64 * 64 + 2 * 64 + 64 + 64 + 1) + ATTENTION_BYTES // 2
    layer_bytes = 8 * (EXPERT_BYTES + ROUTER_BYTES) + ATTENTION_BYTES
    routed = 4 * 21 * (64 * (2 + 3 * 3) + 3 * 3 * 64 / 8)
    assert needs.device_bytes == 4 * layer_parameters + layer_bytes + routed
    assert (needs.host_bytes, needs.state_bytes) == (2 * 64 * 64, 4 * 21 * 64)
    assert needs.counts == {"tokens": 21}
    assert needs.gpu_ms is None


def test_calibration_holds_a_layer_at_a_time() -> None:
    calibration = CalibrateKvConfig(max_sequences=3, max_tokens=7, batch_tokens=14, precision="float32")
    needs = run(task("calibrate_kv", calibration, "ingest"))["calibrate_kv"].needs
    assert needs.read_bytes == PARENT_BYTES
    assert needs.host_bytes == 2 * 64 * 64 + 4 * 21 * 64, "the embedding, and all states"
    larger = run(task("calibrate_kv", calibration.but(batch_tokens=21), "ingest"))["calibrate_kv"].needs
    assert larger.device_bytes - needs.device_bytes == 4 * 7 * (64 * (3 + 3 * 2) + 3 * 2 * 64 / 8)


def test_scoring_counts_what_scoring_does() -> None:
    """Counts 8 and 4, window 4: 2 variants in windowed layers and 4 in full ones, in batches of 2."""
    space = SearchSpace(expert_counts=(8, 4), windows=(4,))
    config = ScoreBlocksConfig(space=space, max_sequences=2, max_tokens=10, variants_per_batch=2)
    needs = run(task("score_blocks", config, "ingest"))["score_blocks"].needs
    assert needs.counts["variants"] == 12
    assert needs.counts["replacements"] == 8
    assert needs.counts["block_forwards"] == scoring.num_steps([2, 4, 2, 4]) + 2 * 4
    layer_bytes = 8 * (EXPERT_BYTES + ROUTER_BYTES) + ATTENTION_BYTES
    by_groups = 4 * 1 + 3 * 2 + 2 * 1 + 1 * 2
    assert needs.read_bytes == (3 * 4 + by_groups) * layer_bytes + OUTER_BYTES


def test_pruning_copies_the_child_and_shares_what_is_whole() -> None:
    found = run(
        task("prune_model1", PruneModelConfig(), "ingest"),
        task("prune_model2", PruneModelConfig(candidate="uniform"), "ingest"),
    )
    first, second = found["prune_model1"], found["prune_model2"]
    assert first.needs.read_bytes == first.needs.written_bytes == first.upload_bytes == CHILD_BYTES
    assert first.download_bytes == PARENT_BYTES
    assert second.upload_bytes == 2 * (4 * (EXPERT_BYTES + ROUTER_BYTES) + ATTENTION_BYTES), "its two pruned layers"


def test_recovery_uploads_everything_but_experts_once_per_stage() -> None:
    policy = ReinforceConfig(steps=3, prompts_per_step=2, generations_per_prompt=4, max_new_tokens=20)
    found = run(
        task("prune_model", PruneModelConfig(), "ingest"),
        task("distill", DistillConfig(steps=10, rows_per_step=2, sequence_tokens=100), "prune_model", "ingest"),
        task("reinforce1", policy, "distill"),
        task("reinforce2", policy, "distill"),
        task("average_checkpoints", AverageCheckpointsConfig(), "reinforce1", "reinforce2"),
        task("evaluate", EvaluateConfig(problems_per_task=3, max_new_tokens=20), "average_checkpoints"),
    )
    for name in ("distill", "reinforce1", "reinforce2", "average_checkpoints"):
        assert found[name].upload_bytes == found[name].needs.written_bytes == OUTSIDE_EXPERTS
    assert found["average_checkpoints"].needs.read_bytes == 2 * OUTSIDE_EXPERTS
    assert found["average_checkpoints"].download_bytes == CHILD_BYTES + OUTSIDE_EXPERTS, "experts once"
    assert found["distill"].needs.counts["tokens"] == 2000
    assert found["reinforce1"].needs.counts["replies"] == 24
    assert found["evaluate"].needs.counts == {"replies": 2 * 3 * 3, "tokens": 180}
    assert found["evaluate"].download_bytes == CHILD_BYTES


def test_export_links_and_serving_loads_one_model_at_a_time() -> None:
    """Folding writes all but experts of the layers anew; engines keep experts packed, ``moesaic serve`` does not."""
    sweep = SweptWorkload(name="short", input_tokens=8, output_tokens=4, concurrencies=(1, 2))
    load = BenchmarkServingConfig(workloads=(sweep,), requests_per_user=3, repeats=2)
    found = run(
        task("prune_model", PruneModelConfig(), "ingest"),
        task("export_engine1", ExportEngineConfig(target="vllm", compare_outputs=False), "ingest"),
        task("export_engine2", ExportEngineConfig(target="tensorrt_llm", compare_outputs=False), "prune_model"),
        task("benchmark_serving1", load, "export_engine1", "export_engine2"),
        task("benchmark_serving2", load.model_copy(update={"engine": "vllm"}), "export_engine1", "export_engine2"),
    )
    assert found["export_engine1"].upload_bytes == 0
    assert found["export_engine2"].upload_bytes == OUTSIDE_EXPERTS - OUTER_BYTES
    ours, theirs = (found[name].needs for name in ("benchmark_serving1", "benchmark_serving2"))
    assert ours.counts == {"points": 2, "requests": 2 * 2 * (3 + 1) * (1 + 2)}
    assert ours.read_bytes == 2 * (PARENT_BYTES + CHILD_BYTES)
    assert theirs == ours, "without modelled hardware all of it is in one process"


def test_only_what_learns_has_optimiser_state() -> None:
    """Attention and norms of 4 layers, final norm, embedding and head: 16 bytes each; the router does not learn."""
    distill = task("distill", DistillConfig(steps=1, rows_per_step=1, sequence_tokens=8), "prune_model", "ingest")
    needs = run(task("prune_model", PruneModelConfig(), "ingest"), distill)["distill"].needs
    trainable = 4 * ATTENTION_BYTES // 2 + OUTER_BYTES // 2
    assert needs.counts["trainable_parameters"] == trainable
    weights = 2 * sum(layout.num_parameters(SHAPE, model) for model in (PARENT, CHILD))
    states, heads, logits = (4 + 2 * 4 + 4) * 8 * 64 * 2, (2 + 16) * 64 * 64, 4 * 1024 * 64 * 4
    assert needs.device_bytes == weights + 14 * trainable + states + heads + logits


def test_a_distillation_that_does_not_fit_is_refused_with_what_does() -> None:
    facts = Facts(
        GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, Target(H100, GPT_OSS_120B, 8, "fp8")
    )
    config = DistillConfig(sequence_tokens=131_072, rows_per_step=32)
    assert distill_needs.fewest_nodes(config, facts) == 2
    for nodes in (2, 4):
        distill_needs.check_nodes(config, facts, nodes)
        assert distill_needs.gpu_bytes(config, facts, 8 * nodes) < 72 * GIB
    distill_needs.check_nodes(config.but(rows_per_step=64), facts, 8)
    with pytest.raises(InfeasibleError, match=r"95.2 GiB on each of 8 GPUs.* these rows on 2 nodes or rows of 16384 "):
        distill_needs.check_nodes(config, facts, 1)
    with pytest.raises(ConfigError, match=r"rows_per_step 32 is not a multiple of 24 processes"):
        distill_needs.check_nodes(config, facts, 3)
    with pytest.raises(InfeasibleError, match=r"fits on no 16 nodes .* what fits: rows of 131072 tokens on 16 nodes"):
        distill_needs.fewest_nodes(config.but(sequence_tokens=2**20), facts)
    with pytest.raises(ConfigError, match=r"rows_per_step 12 is not a multiple of 16 processes"):
        distill_needs.fewest_nodes(config.but(rows_per_step=12), facts)


def test_only_what_does_not_fit_is_refused_with_what_does() -> None:
    """Hidden states of 143 GiB spill; what must be on a GPU at once, and half of it for states, is what counts."""
    recipe = RECIPES["gpt_oss_120b_h100x8"]()
    scores = task("score_blocks", recipe.score_blocks, "ingest")
    target = Target(H100, GPT_OSS_120B, 8, "fp8", "tensorrt_llm")
    facts = Facts(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, target)
    planned = plan([task("ingest", INGEST), scores], facts)
    assert planned[1].needs.state_bytes > 140 * GIB > 21 * GIB > planned[1].needs.device_bytes
    check_devices(planned, facts)
    smaller = replace(facts, target=replace(target, table=replace(H100, memory_mib=40_960)))
    with pytest.raises(
        InfeasibleError, match=r"score_blocks takes 40\.7 GiB on a GPU, where 36\.0 .*: (.*)"
    ) as refused:
        check_devices(planned, smaller)
    advice = str(refused.value).split("what fits: ")[1].split(" or ")
    assert advice and all(" " in one for one in advice)
    for key, value in (one.split() for one in advice):
        half = task("score_blocks", recipe.score_blocks.but(**{key: int(value)}), "ingest")
        check_devices(plan([task("ingest", INGEST), half], smaller), smaller)
        twice = task("score_blocks", recipe.score_blocks.but(**{key: 2 * int(value)}), "ingest")
        with pytest.raises(InfeasibleError):
            check_devices(plan([task("ingest", INGEST), twice], smaller), smaller)
    tiny = replace(facts, target=replace(target, table=replace(H100, memory_mib=4096)))
    with pytest.raises(InfeasibleError, match=r"a smaller model; none of variants_per_batch, batch_tokens, max_long"):
        check_devices(planned, tiny)


def test_an_engine_holds_the_requests_that_its_cache_has_room_for() -> None:
    facts = Facts(
        GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, Target(H100, GPT_OSS_120B, 8, "fp8")
    )
    asked = Requests(64, 66_560, "tensorrt_llm", "bfloat16", "bf16", num_gpus=8)
    each = 18 * (66_560 + 128) * 2 * 8 * 64 * 2
    few = generation("evaluate", facts, GPT_OSS_120B_BLOCKS, asked)
    fewer = generation("evaluate", facts, GPT_OSS_120B_BLOCKS, replace(asked, in_flight=63))
    assert (few.requests, few.device_bytes - fewer.device_bytes) == (64, pytest.approx(each / 8))
    many = generation("evaluate", facts, GPT_OSS_120B_BLOCKS, replace(asked, in_flight=1024))
    assert 64 < many.requests < 1024
    assert many.device_bytes <= (81_559 - 10_240) * 2**20
    with pytest.raises(InfeasibleError, match=r"evaluate has .* GiB of 1 GPU.* what fits: 2 GPUs, or shorter replies"):
        generation("evaluate", facts, GPT_OSS_120B_BLOCKS, replace(asked, num_gpus=1, longest=2**18))


def test_a_router_that_learns_is_written_anew() -> None:
    words = {"trainable": ("router",), "steps": 1}
    distill = task("distill", DistillConfig.model_validate(words), "prune_model", "ingest")
    found = run(task("prune_model", PruneModelConfig(), "ingest"), distill)
    assert found["distill"].upload_bytes == OUTSIDE_EXPERTS - OUTER_BYTES


def test_time_is_what_the_table_says() -> None:
    """8192 tokens in sequences of 1024 are one chunk; on 8 GPUs all eight are busy for it."""
    target = Target(H100, GPT_OSS_120B, 8, "fp8")
    facts = Facts(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, target)
    block = Block(128, 4, 2880)
    expected = target.pass_ms(block, 8192) + 8 * target.prompt_attention_ms(block, 1024)
    assert forward_ms(facts, [block, block], 8192, 1024, head=False) == pytest.approx(8 * 2 * expected)


def test_learning_counts_operations() -> None:
    """One token of 84B at 128K by hand: three forwards of matrices in the child and one in the parent, 10.3 GFLOP each;
    attention is 5 of the child's and parent's passes; 2.1B parameters learn."""
    target = Target(H100, GPT_OSS_120B, 8, "fp8")
    facts = Facts(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, target)
    words = ("attention", "norms", "embedding", "head")
    ms = learn_ms(facts, 1.0, 131_072, words, teacher=True)
    assert ms is not None
    experts = 36 * 2 * 4 * 24_894_721 / (0.32e12)
    dense = 2 * (36 * 26_556_096 + 579_133_440) / 0.6e12
    pairs_full, pairs_8k, pairs_128 = 65_536, 8192 * (1 - 8192 / 2 / 131_072), 128
    attention = [
        4 * 64 * 64 * (full * pairs_full + windows * pairs_8k + 18 * pairs_128) / 0.4e12
        for full, windows in ((18, 0), (10, 8))
    ]
    learning = 2 * (36 * 26_556_096 + 579_133_440) / 0.6e12
    expected = 4 * (experts + dense) + attention[0] + 4 * attention[1] + learning
    assert ms == pytest.approx(expected, rel=2e-3)


def test_a_child_to_plan_with() -> None:
    config = SearchArchitectureConfig(max_experts_ratio=0.7)
    assert assume_child(GPT_OSS_120B_BLOCKS, config) == GPT_OSS_PUZZLE_88B_BLOCKS
    assert assume_child(PARENT, config) == Architecture.of(Block(5, 2, 64, block.window) for block in PARENT.blocks)


def _plan_120b() -> list[Planned]:
    recipe = RECIPES["gpt_oss_120b_h100x8"]()
    target = Target(H100, GPT_OSS_120B, 8, "fp8")
    facts = Facts(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, target)
    return plan(read_tasks(compiled()["compress"], recipe), facts)


def test_gpt_oss_120b_is_plausible() -> None:
    planned = _plan_120b()
    by_name = {one.task.name: one for one in planned}
    assert by_name["rank-experts"].needs.read_bytes / GIB == pytest.approx(60.8 - 1.08, abs=0.05)
    assert by_name["prune-model"].needs.written_bytes / GIB == pytest.approx(46.6, abs=0.05)
    assert by_name["prune-model"].needs.device_bytes / GIB < 4
    assert by_name["score-blocks"].needs.counts["replacements"] == 18 * 7 + 18 * 15
    distill = by_name["distill"].needs
    assert distill.counts["tokens"] == pytest.approx(84e9, rel=1e-3)
    assert distill.counts["trainable_parameters"] == pytest.approx(2.1e9, rel=0.02)
    assert distill.counts["optimizer_bytes"] / GIB == pytest.approx(31.5, abs=0.5)
    assert by_name["distill"].upload_bytes / GIB == pytest.approx(3.97, abs=0.05), "of 46.6 GiB; experts are shared"
    assert distill.gpu_ms is not None
    assert 3000 < distill.gpu_ms / 3.6e6 < 15_000
    sums = totals(planned)
    assert all(math.isfinite(value) for value in sums.values() if value is not None)
    assert sums["gpu_hours"] is not None


def test_every_task_of_a_pipeline_is_planned_in_order() -> None:
    planned = _plan_120b()
    names = [one.task.name for one in planned]
    assert len(set(names)) == len(names)
    assert {"reinforce[0]", "reinforce[1]", "reinforce-2[1]", "prune-model-3[5]", "evaluate-14[0]"} <= set(names)
    for position, one in enumerate(planned):
        assert set(one.task.models) <= set(names[:position])
    average = next(one.task for one in planned if one.task.name == "average-checkpoints")
    assert average.models == ("reinforce[0]", "reinforce[1]")
    policies = [one.task.config for one in planned if one.task.name.startswith("reinforce[")]
    assert [getattr(config, "name", None) for config in policies] == ["high", "mixed"]


def _facts_of(recipe: str) -> Facts:
    """Facts of the model that a recipe is for, without time."""
    if "gpt_oss" not in recipe:
        return replace(TINY, child=assume_child(PARENT, SearchArchitectureConfig()))
    whole = GPT_OSS_120B_BLOCKS if "120b" in recipe else GPT_OSS_20B_BLOCKS
    return Facts(GPT_OSS_120B, whole, True, assume_child(whole, SearchArchitectureConfig()), None)


def test_a_control_takes_half_of_all_training() -> None:
    recipe = RECIPES["gpt_oss_120b_h100x8"]()
    facts = Facts(
        GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, GPT_OSS_PUZZLE_88B_BLOCKS, Target(H100, GPT_OSS_120B, 8, "fp8")
    )

    def hours(recipe: Recipe, stage: str) -> float:
        tasks = read_tasks(find_pipeline("compress", 1, recipe.baseline is not None), recipe)
        return sum(one.needs.gpu_ms or 0 for one in plan(tasks, facts) if one.task.stage == stage)

    without = recipe.but(baseline=None)
    for stage in ("distill", "reinforce"):
        assert hours(without, stage) == pytest.approx(hours(recipe, stage) / 2)
    one_policy = without.but(policies=without.policies[:1])
    assert hours(one_policy, "reinforce") == pytest.approx(hours(without, "reinforce") / 2)
    assert hours(one_policy, "average_checkpoints") == 0


@pytest.mark.parametrize("pipeline", ["compress", "search"])
def test_every_recipe_can_be_planned(pipeline: str) -> None:
    for name, made in RECIPES.items():
        recipe = made()
        tasks = read_tasks(find_pipeline(pipeline, recipe.rounds, recipe.baseline is not None), recipe)
        planned = plan(tasks, _facts_of(name))
        assert totals(planned)["gpu_hours"] is None
        assert {"ingest", "prune_model", "evaluate"} <= {task.stage for task in tasks}


def test_plan_of_a_checkpoint_reads_no_weights(
    tiny_parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))
    given = ["plan", "compress", "--recipe", "tiny_cpu", "--parent", str(tiny_parent), "--json"]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["gpu_hours"] is None
    assert any("Time is not modelled" in note for note in found["notes"])
    ranking = next(row for row in found["tasks"] if row["stage"] == "rank_experts")
    assert ranking["read_bytes"] == PARENT_BYTES - 2 * 64 * 64


def test_plan_of_gpt_oss_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    like = ["--recipe", "gpt_oss_120b_h100x8", "--like", "gpt-oss-120b", "--store", "s3://bucket/prefix"]
    assert main(["plan", "compress", *like]) == 0
    shown = capsys.readouterr().out
    assert "60.8 GiB" in shown
    assert "46.6 GiB" in shown
    assert "S3 up" in shown
    words = " ".join(shown.split())
    assert "What is trained is planned for 4 nodes of 8 GPUs." in words
    assert "- distill, computed: 56.9 GiB: inputs of layers 25.3 GiB, " in words
    assert "- evaluate, computed: 69.6 GiB: KV cache of 363 requests of full length 63.5 GiB, weights 6.2 GiB" in words
    assert main(["plan", "compress", *like, "--nodes", "1"]) == 2
    assert "what fits: these rows on 2 nodes" in " ".join(capsys.readouterr().err.split())
    assert main(["plan", "compress", *like, "--nodes", "2"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reinforce takes 75.1 GiB" in said and "what fits: max_new_tokens 32768 or 4 nodes" in said
    assert main(["plan", "compress", *like[:-1], "elsewhere"]) == 2
    assert main(["plan", "nothing", *like]) == 2
    assert not torch.cuda.is_initialized()


def test_plan_tells_what_a_simulated_step_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulations themselves have tests of their own."""
    like = ["plan", "compress", "--recipe", "gpt_oss_120b_h100x8", "--like", "gpt-oss-120b", "--simulate"]
    for stage in ("rank_experts", "score_blocks", "refine_architecture"):
        monkeypatch.setattr(f"moesaic.search.{stage}.needs.simulate", lambda *_: None)
    monkeypatch.setattr("moesaic.recover.calibrate_kv.needs.simulate", lambda *_: None)
    for peak, status in ((60 * GIB, 0), (75 * GIB, 2)):
        parts = {"weights": peak - 1, "rest": 1}
        monkeypatch.setattr("moesaic.recover.distill.needs.simulated_peak", lambda *_, parts=parts: Peak(parts))
        assert main(like) == status
    shown = capsys.readouterr()
    assert "- distill, simulated: 60.0 GiB: weights 60.0 GiB, rest 0.0 MiB" in " ".join(shown.out.split())
    assert "- rank_experts, computed: 13.6 GiB: layers" in " ".join(shown.out.split())
    assert "distill takes 75.0 GiB on each of 32 GPUs, where 71.7 are to be had" in " ".join(shown.err.split())


def test_what_goes_layer_by_layer_is_simulated_for_any_checkpoint(
    tiny_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", "search", "--recipe", "tiny_cpu_fast", "--parent", str(tiny_parent), "--json"]
    assert main(given) == 0
    computed = {row["task"]: row for row in json.loads(capsys.readouterr().out)["tasks"]}
    assert main([*given, "--simulate"]) == 0
    found = {row["task"]: row for row in json.loads(capsys.readouterr().out)["tasks"]}
    stages = {row["stage"] for row in found.values() if row["simulated"]}
    assert stages == {"rank_experts", "score_blocks", "refine_architecture"}
    for name, row in found.items():
        assert row["device_bytes"] == sum(row["device"].values())
        assert row["device_bytes"] == pytest.approx(computed[name]["device_bytes"], rel=0.2), name


def test_data_sets_are_counted(tiny_parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = Path(__file__).parents[2] / "examples" / "tiny_reasoner" / "data"
    lines = (examples / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:17]))
    given = ["plan", "search", "--recipe", "tiny_cpu", "--parent", str(tiny_parent), "--data", str(tmp_path)]
    assert main(given) == 0
    assert "17 prompts and 40 test problems" in capsys.readouterr().out
    (tmp_path / "prompts.jsonl").unlink()
    assert main(given) == 2

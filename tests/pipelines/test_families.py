"""Other families go through the same stages: ranked, scored, costed, searched, pruned, evaluated, distilled."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.core.workbench import Workbench
from moesaic.costs.block_costs import CostTable
from moesaic.costs.facts import Facts, PipelineTask
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.workload import Workload
from moesaic.data.sets import DataSets
from moesaic.deploy.export_engine import run as export_engine
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.method import search
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families import PUBLISHED
from moesaic.pipelines import example
from moesaic.pipelines.recipes import find_recipe
from moesaic.platform.planning import needs_of
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.space import SearchSpace
from moesaic.stages import STAGES
from tests.recover.forked_engine import fork_engine
from tests.tiny_models import write_glm4, write_qwen3

DATA = DataSets.at(example() / "data")
SPACE = SearchSpace(expert_counts=(6, 4), expert_widths=(16,), experts_per_token=(1,), windows=(64,))
RECIPE = find_recipe("tiny_cpu_fast").but(
    rank_experts={"max_sequences": 4, "max_tokens": 256},
    score_blocks={"space": SPACE, "max_sequences": 2},
    measure_costs={"source": "model", "hardware": "h100", "space": SPACE},
    search_architecture={"limits": {}, "max_experts_ratio": 0.7, "frontier_points": 2},
    refine_architecture={"max_sequences": 2, "evaluations": 2},
    generate_traces={"max_prompts": 8, "max_new_tokens": 8, "keep_truncated": True},
    distill={"steps": 2},
    evaluate={"problems_per_task": 1, "efforts": ("low",), "max_new_tokens": 8},
)


@pytest.fixture(scope="module", params=[write_qwen3, write_glm4])
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the tiny reasoner's tokenizer."""
    directory, tokens = tmp_path_factory.mktemp("random") / "parent", Checkpoint.open(example() / "parent")
    sizes = {"vocab_size": tokens.shape.vocab_size, "max_position_embeddings": tokens.shape.max_positions}
    request.param(directory, **sizes, eos_token_id=2, pad_token_id=0)
    for path in tokens.directory.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copyfile(path, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def found(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a child was searched and cut."""
    directory = tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        search(parent, DATA, RECIPE, directory)
    return directory


def test_the_method_makes_a_child(parent: Path, found: Path) -> None:
    assert "uniform" in json.loads((found / "search_architecture" / "architecture.json").read_text())["candidates"]
    whole, child = Checkpoint.open(parent), Checkpoint.open(found / "prune_model")
    assert child.config["model_type"] == whole.shape.family.child_type
    child.architecture.check_child_of(whole.architecture)
    assert child.architecture.num_experts <= 0.7 * whole.architecture.num_experts


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.timeout(600)
def test_the_child_recovers(parent: Path, found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_engine(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    bench, child = Workbench(found), found / "prune_model"
    traces = bench.run(STAGES["generate_traces"], RECIPE.generate_traces, model=parent, prompts=DATA.prompts)
    distilled = bench.run(STAGES["distill"], RECIPE.distill, child=child, parent=parent, traces=traces)
    evaluation = bench.run(STAGES["evaluate"], RECIPE.evaluate, model=distilled, tests=DATA.tests)
    content, pruned = json.loads((evaluation / "evaluation.json").read_text()), Checkpoint.open(child)
    assert [step["stage"] for step in content["steps"]] == ["distill"]
    assert content["parameters"] == layout.num_parameters(pruned.shape, pruned.architecture)
    trained = Checkpoint.open(distilled)
    same = {name: torch.equal(trained.tensor(name), pruned.tensor(name)) for name in pruned.tensors}
    assert not same["model.layers.1.self_attn.q_proj.weight"]
    assert all(unchanged for name, unchanged in same.items() if ".mlp." in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "tensorrt_llm", "kv_cache": "bf16"}, "tensorrt_llm cannot run models of the family"),
        ({"target": "vllm", "kv_cache": "fp8_unit"}, "fp8_cache cannot .* for this family there are vllm"),
    ],
)
def test_what_has_no_code_for_the_family_says_so(
    parent: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    config = ExportEngineConfig.model_validate(settings)
    with pytest.raises(ConfigError, match=message):
        export_engine.run(config, child=parent, output=tmp_path / "bundle", scratch=tmp_path)


@pytest.mark.usefixtures("one_thread")
def test_blocks_and_the_rest_are_timed(parent: Path, tmp_path: Path) -> None:
    """In process: every block of the space in both phases, and the model without its layers."""
    load = Workload(name="short", concurrency=2, input_tokens=16, output_tokens=4)
    space = SearchSpace(expert_counts=(4,), expert_widths=(16,))
    config = MeasureCostsConfig(workloads=(load,), space=space, engine="moesaic", repeats=5)
    measure_costs.run(config, parent=parent, output=tmp_path, scratch=tmp_path)
    costs, checkpoint = CostTable.from_json((tmp_path / "costs.json").read_text()), Checkpoint.open(parent)
    dense = [block for block in costs.blocks if block.is_dense]
    assert len(costs.blocks) - len(dense) == 4
    assert dense == [block for block in checkpoint.architecture.blocks if block.is_dense]
    assert costs.evaluate(costs.parent).parameters == layout.num_parameters(checkpoint.shape, checkpoint.architecture)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "GLM-4.5-Air"])
def test_a_plan_refuses_what_no_gpu_could_run(name: str) -> None:
    model, recipe = PUBLISHED[name], find_recipe("gpt_oss_120b_h100x8")
    target = Target(read_table("h100"), model.shape, 8, "bf16", "vllm")
    facts = Facts(model.shape, model.architecture, False, model.architecture, target)
    refused = {"distill": (recipe.distill, "distill_on_gpus"), "reinforce": (recipe.policies[0], "nemo_rl")}
    for stage, (config, program) in refused.items():
        with pytest.raises(ConfigError, match=f"{program} cannot run models of the family {model.shape.family.name}"):
            needs_of(PipelineTask(stage, stage, config, ()), facts, ({"parent": 1},))

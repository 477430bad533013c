"""The method in plain Python: it makes the child that the compiled pipeline makes, and recovers it."""

import io
import json
from pathlib import Path

import pytest
from kfp import compiler, dsl
from rich.console import Console

from components.ingest.component import ingest
from moesaic.core.files import file_digest
from moesaic.data.sets import DataSets
from moesaic.method import compress, search
from moesaic.pipelines import example
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import find_recipe
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.local import run_compiled
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.store import Manifest, Store
from moesaic.search.space import SearchSpace
from pipelines.assembly import AssemblyConfigs, assemble

PARENT, DATA = example() / "parent", DataSets.at(example() / "data")


@pytest.fixture
def recipe() -> Recipe:
    """The short demo's, with costs out of a table: measured ones differ from run to run, and so may the child."""
    space = SearchSpace(expert_counts=(16, 10, 4), windows=(64,))
    return find_recipe("tiny_cpu_fast").but(
        rank_experts={"max_sequences": 4, "max_tokens": 256},
        score_blocks={"space": space, "max_sequences": 2},
        measure_costs={"source": "model", "hardware": "h100", "space": space},
        search_architecture={"limits": {}, "frontier_points": 2},
        refine_architecture={"max_sequences": 2, "evaluations": 3},
        generate_traces={"max_prompts": 24, "max_new_tokens": 8, "keep_truncated": True},
        distill={"steps": 0},
        policies=(find_recipe("tiny_cpu_fast").policies[0].but(steps=0),),
        average_checkpoints={"weights": None},
        calibrate_kv={"max_sequences": 4, "max_tokens": 256},
        evaluate={"problems_per_task": 1, "efforts": ("low",), "max_new_tokens": 8},
    )


@dsl.pipeline(name="only-search")
def only_search(
    version: str,
    ingest_config: str,
    rank_experts_config: str,
    score_blocks_config: str,
    measure_costs_config: str,
    search_architecture_config: str,
    refine_architecture_config: str,
    prune_model_config: str,
) -> dsl.Model:
    """What ``search`` does, of the same parts as the whole pipeline."""
    given = ingest(config=ingest_config, version=version).outputs
    configs = AssemblyConfigs(
        version=version,
        rank_experts=rank_experts_config,
        score_blocks=score_blocks_config,
        measure_costs=measure_costs_config,
        search_architecture=search_architecture_config,
        refine_architecture=refine_architecture_config,
        prune_model=prune_model_config,
    )
    return assemble(configs, given["parent"], given["calibration_short"], given["calibration_long"]).child


def run_pipeline(recipe: Recipe, directory: Path) -> Manifest:
    """The child that the compiled pipeline makes."""
    directory.mkdir()
    compiler.Compiler().compile(only_search, str(directory / "only-search.yaml"))
    context = RunContext(store=directory / "store", run_directory=directory)
    store = Store.at(context.store)
    sets = {
        name: store.add_file(path, "dataset", format="jsonl", producer="test").id
        for name, path in DATA.by_name().items()
    }
    model = store.add_directory(PARENT, "model", format="safetensors", producer="test").id
    parameters = [
        "version",
        *(f"{name}_config" for name in ("ingest", "rank_experts", "score_blocks", "measure_costs")),
    ]
    parameters += ["search_architecture_config", "refine_architecture_config", "prune_model_config"]
    arguments = recipe.arguments(IngestConfig(parent=model, **sets), "1", parameters)
    (child,) = run_compiled(directory / "only-search.yaml", arguments, context, Console(file=io.StringIO())).values()
    return Manifest.read(child)


@pytest.mark.timeout(900)
def test_plain_python_makes_the_pipelines_child_and_recovers_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    found = search(PARENT, DATA, recipe, tmp_path / "plain")
    child = {path.name: file_digest(path) for path in found.child.iterdir()}
    assert {entry.path: entry.sha256 for entry in run_pipeline(recipe, tmp_path / "kubeflow").files} == child

    made = compress(PARENT, DATA, recipe, tmp_path / "plain")
    assert made.found == found
    evaluated = {name: json.loads((path / "evaluation.json").read_text()) for name, path in made.evaluations.items()}
    sizes = {name: one["parameters"] for name, one in evaluated.items()}
    assert sizes["pruned"] == sizes["distilled"] == sizes["child"] < sizes["parent"]
    assert [step["stage"] for step in evaluated["child"]["steps"]] == [
        "fit_routers",
        "distill_blocks",
        "distill",
        "reinforce",
        "average_checkpoints",
        "calibrate_kv",
    ]
    experts = [name for name in child if "-experts" in name]
    assert experts
    assert all(file_digest(made.child / name) == child[name] for name in experts)

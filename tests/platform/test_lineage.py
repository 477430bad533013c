"""Histories read back from records; the recipe that a run was made with is its own oracle."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.costs.workload import Workload
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.lineage import find_digest, origins, sources, trace, unknown_inputs, walk
from moesaic.platform.runs.records import Record
from moesaic.platform.runs.reproduction import pipeline_of, recipe_values
from moesaic.platform.runs.runtime import run_stage
from moesaic.platform.store import Store
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.space import SearchSpace
from tests.data_sets import add_sets
from tests.platform.played_run import PlayedRun, play


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.at(tmp_path_factory.mktemp("lineage") / "store")


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> PlayedRun:
    return play(store, RECIPES["tiny_cpu"](), tmp_path_factory.mktemp("played") / "run")


def test_from_the_child_back_to_the_parent_and_the_calibration_data(store: Store, run: PlayedRun) -> None:
    child = trace(store, run.child.record.origin)
    stages = {origin.stage for origin in origins(child).values()}
    assert stages == {
        *("ingest", "generate_traces", "rank_experts", "score_blocks", "measure_costs", "search_architecture"),
        "refine_architecture",
        *(
            "prune_model",
            "fit_routers",
            "distill_blocks",
            "distill",
            "reinforce",
            "average_checkpoints",
            "calibrate_kv",
        ),
    }
    assert sources(child) == {
        name: getattr(run.inputs, name) for name in ("calibration_long", "calibration_short", "parent", "prompts")
    }
    assert unknown_inputs(store, child) == []
    (model,) = child.given("model")
    assert [policy.stage for policy in model.given("policies")] == ["reinforce", "reinforce"]


def test_the_report_knows_its_child_by_digest(store: Store, run: PlayedRun) -> None:
    report = trace(store, run.report.record.origin)
    found = find_digest(report, run.child.digest)
    assert found is not None
    assert found.id == run.child.record.origin
    assert find_digest(report, "0" * 64) is None
    assert sources(report) == run.inputs.model_dump()


def test_what_is_gone_is_named(run: PlayedRun, store: Store, tmp_path: Path) -> None:
    from shutil import copytree

    other = Store.at(copytree(store.directory, tmp_path / "store"))
    child = trace(other, run.child.record.origin)
    (ranking,) = {given.origin.id for given in walk(child) if given.name == "ranking" and given.origin}
    (tmp_path / "store" / "records" / f"{ranking}.json").unlink()
    (tmp_path / "store" / "manifests" / f"{run.inputs.parent}.json").unlink()
    missing = unknown_inputs(other, trace(other, run.child.record.origin))
    assert {given.name for given in missing} == {"ranking", "parent", "model"}, "the parent goes by two names"
    assert {given.digest for given in missing if given.name != "ranking"} == {run.inputs.parent}


def test_a_changed_record_is_refused(run: PlayedRun, store: Store, tmp_path: Path) -> None:
    from shutil import copytree

    other = Store.at(copytree(store.directory, tmp_path / "store"))
    path = tmp_path / "store" / "records" / f"{run.child.record.origin}.json"
    record = json.loads(path.read_text())
    path.chmod(0o644)
    path.write_text(json.dumps(record | {"code_digest": "d" * 64}))
    with pytest.raises(ArtifactError, match="was changed; it cannot be relied on"):
        trace(other, run.child.record.origin)
    with pytest.raises(ArtifactError, match="holds no record 000"):
        trace(other, "0" * 64)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_recipe_is_read_back_from_the_records(rounds: int, tmp_path: Path) -> None:
    recipe = RECIPES["tiny_cpu"]().model_copy(update={"rounds": rounds}).seeded(3)
    if rounds > 1:
        earlier = recipe.search_architecture.model_copy(update={"max_experts_ratio": 0.9})
        recipe = recipe.model_copy(update={"earlier_search_architecture": earlier})
    store = Store.at(tmp_path / "store")
    played = play(store, recipe, tmp_path / "run")
    report, verdict = (trace(store, made.record.origin) for made in (played.report, played.verdict))
    values = recipe_values(report, verdict)
    found = Recipe.parse(
        json.dumps(
            {name: values[name] for name in Recipe.model_fields if name in values}
            | {name: recipe.model_dump(mode="json")[name] for name in Recipe.model_fields if name not in values}
        )
    )
    unused = {"earlier_distill", "earlier_search_architecture"} if rounds == 1 else set()
    assert found.model_dump(exclude=unused) == recipe.model_dump(exclude=unused)
    assert set(Recipe.model_fields) - set(values) <= {"promote"}
    assert pipeline_of(report) == "compress"


def test_stages_leave_their_records_in_the_store(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.at(tmp_path / "store")
    model = store.add_directory(tiny_parent, "model", format="safetensors", producer="ingest").id
    sets = add_sets(store, tmp_path / "data")
    monkeypatch.setenv("MOESAIC_STORE", str(store.directory))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = IngestConfig(parent=model, **sets)
    names = ("parent", "calibration_short", "calibration_long", "prompts", "tests")
    artifacts = {name: SimpleNamespace(path=str(tmp_path / "out" / name)) for name in (*names, "costs")}
    workload = Workload(name="long", input_tokens=8, output_tokens=2, concurrency=1)
    costs = MeasureCostsConfig(space=SearchSpace(expert_counts=(4,)), workloads=(workload,), source="model")
    run_stage("ingest", given.to_json(), {}, {name: artifacts[name] for name in names})
    run_stage("measure_costs", costs.to_json(), {"parent": artifacts["parent"]}, {"costs": artifacts["costs"]})
    record = Record.read(tmp_path / "out" / "costs")
    made = trace(store, record.origin)
    assert (made.stage, made.record) == ("measure_costs", record)
    assert [(one.name, one.digest, one.origin and one.origin.record.subject) for one in made.inputs] == [
        ("parent", model, "parent")
    ]
    assert sources(made) == {"parent": model}
    assert unknown_inputs(store, made) == []

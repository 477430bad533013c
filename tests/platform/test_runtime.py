"""A stage inside a task: config, inputs, scratch, store, record and failure, with the real ingest and prune_model."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moesaic.core import code
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models.checkpoint import Checkpoint
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.records import Record, content_digest
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.runs.runtime import FAILURE, baselines_of, plan_stage, run_stage
from moesaic.platform.store import Manifest, Store
from tests.data_sets import add_sets

SETS = ("calibration_short", "calibration_long", "prompts", "tests")


@dataclass
class Artifact:
    """What a stage sees of a Kubeflow artifact."""

    path: str
    values: dict[str, float] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.values[name] = value


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunContext:
    context = RunContext(store=tmp_path / "store", run_directory=tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in context.as_environment().items():
        monkeypatch.setenv(name, value)
    return context


@pytest.fixture
def ingest_config(context: RunContext, tiny_parent: Path, tmp_path: Path) -> IngestConfig:
    store = Store.at(context.store)
    model = store.add_directory(tiny_parent, "model", format="safetensors", producer="test").id
    return IngestConfig(parent=model, **add_sets(store, tmp_path / "data", num_rows=2))


def artifacts(directory: Path, *names: str) -> dict[str, Artifact]:
    return {name: Artifact(str(directory / name)) for name in names}


def ingest(config: IngestConfig, directory: Path) -> dict[str, Artifact]:
    outputs = artifacts(directory, "parent", *SETS, "metrics")
    run_stage("ingest", config.to_json(), {}, outputs)
    return outputs


def choose(directory: Path, parent: Path, num_experts: int) -> dict[str, Artifact]:
    """A ranking and an architecture as their stages would write them, keeping the first experts of every layer."""
    whole = Checkpoint.open(parent).architecture
    experts = whole.blocks[0].num_experts
    found = artifacts(directory, "ranking", "architecture")
    for artifact in found.values():
        Path(artifact.path).mkdir()
    layer = {"order": list(range(experts)), "scores": [0.0] * experts}
    ranking = {"criterion": "random", "num_tokens": 1, "layers": [layer] * whole.num_layers}
    (directory / "ranking" / "ranking.json").write_text(json.dumps(ranking))
    blocks = [block.as_config() | {"num_local_experts": num_experts} for block in whole.blocks]
    candidates = {"puzzle": {"blocks": blocks}, "puzzle-2": {"blocks": blocks}, "greedy": {"blocks": blocks}}
    (directory / "architecture" / "architecture.json").write_text(json.dumps({"candidates": candidates}))
    return found


def test_ingest_hands_on_manifests_with_records(
    ingest_config: IngestConfig, context: RunContext, tmp_path: Path
) -> None:
    outputs = ingest(ingest_config, tmp_path / "out")
    parent = Path(outputs["parent"].path)
    assert sorted(path.name for path in parent.iterdir()) == ["manifest.json", "record.json"]
    assert Manifest.read(parent).id == ingest_config.parent
    record = Record.read(parent)
    assert (record.stage, record.subject, record.config_digest) == ("ingest", "parent", ingest_config.digest)
    assert record.metrics == {
        "parent_layers": 4,
        "parent_experts": 32,
        "parent_unused_tensors": 0,
        "calibration_short_rows": 2,
        "calibration_long_rows": 2,
        "prompts_rows": 2,
        "tests_rows": 2,
    }
    assert outputs["metrics"].values == record.metrics == json.loads(Path(outputs["metrics"].path).read_text())
    assert list((context.store / "scratch").glob("*/*/")) == []


def test_weights_go_to_the_store_and_only_their_manifest_on(
    ingest_config: IngestConfig, context: RunContext, tiny_parent: Path, tmp_path: Path
) -> None:
    inputs = {"parent": ingest(ingest_config, tmp_path / "in")["parent"]} | choose(tmp_path, tiny_parent, 4)
    outputs = artifacts(tmp_path / "out", "child", "metrics")
    run_stage("prune_model", '{"candidate": "greedy"}', inputs, outputs)
    child = Path(outputs["child"].path)
    assert sorted(path.name for path in child.iterdir()) == ["manifest.json", "record.json"]
    manifest, record = Manifest.read(child), Record.read(child)
    assert (manifest.producer, manifest.parents) == ("prune_model", (ingest_config.parent,))
    assert record.subject == "greedy"
    assert record.inputs["parent"] == ingest_config.parent
    assert record.code_digest == code.code_digest()
    pruned = Checkpoint.open(Store.at(context.store).materialize(manifest, verify=True))
    assert [block.num_experts for block in pruned.architecture.blocks] == [4] * 4


def test_what_is_done_with_a_model_is_about_that_model(
    ingest_config: IngestConfig, context: RunContext, tiny_parent: Path, tmp_path: Path
) -> None:
    found = ingest(ingest_config, tmp_path / "in")
    inputs = {"parent": found["parent"]} | choose(tmp_path, tiny_parent, 4)
    outputs = artifacts(tmp_path / "out", "child", "metrics")
    run_stage("prune_model", '{"candidate": "puzzle"}', inputs, outputs)
    given = {"model": Path(outputs["child"].path), "tests": Path(found["tests"].path)}
    run = plan_stage("evaluate", "{}", given, Store.at(context.store))
    assert run.subject == "puzzle"
    assert plan_stage("evaluate", "{}", given | {"model": tiny_parent}, Store.at(context.store)).subject == ""


def test_baselines_are_all_candidates_but_the_searchs_own(tiny_parent: Path, tmp_path: Path) -> None:
    found = choose(tmp_path, tiny_parent, 4)
    assert [json.loads(config) for config in baselines_of(found["architecture"].path)] == [
        {"candidate": "greedy", "yarn_factor": None}
    ]


def test_content_digests_ignore_the_record(tmp_path: Path) -> None:
    (tmp_path / "payload.json").write_text("{}")
    before = content_digest(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    assert content_digest(tmp_path) == before
    (tmp_path / "payload.json").write_text("[]")
    assert content_digest(tmp_path) != before


def test_the_key_depends_on_config_inputs_and_code(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    given = {"parent": tiny_parent, "calibration_short": tmp_path / "a.jsonl"}
    key = plan_stage("rank_experts", "{}", given, None).key
    assert plan_stage("rank_experts", '{"seed": 0}', given, None).key == key
    assert plan_stage("rank_experts", '{"seed": 1}', given, None).key != key
    (tmp_path / "a.jsonl").write_text("{} \n")
    assert plan_stage("rank_experts", "{}", given, None).key != key
    (tmp_path / "a.jsonl").write_text("{}\n")
    monkeypatch.setattr(code, "code_digest", lambda: "other")
    assert plan_stage("rank_experts", "{}", given, None).key != key


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("nonsense", "{}", "there is no stage 'nonsense'; choose one of ingest, promote, measure_costs"),
        ("rank_experts", '{"sede": 1}', "sede = 1: Extra inputs are not permitted"),
        ("rank_experts", "{}", r"missing: \['calibration_short', 'parent'\]"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(name: str, config: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_stage(name, config, {}, None)


def test_inputs_that_are_not_there_are_refused(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        plan_stage(
            "measure_costs",
            '{"space": {"expert_counts": [8]}, "workloads": []}',
            {"parent": tmp_path / "nowhere"},
            None,
        )


def test_a_users_error_exits_with_2_and_writes_the_failure(
    ingest_config: IngestConfig, context: RunContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = ingest_config.model_copy(update={"parent": ingest_config.tests})
    with pytest.raises(SystemExit) as stop:
        ingest(swapped, tmp_path / "out")
    assert stop.value.code == 2
    word = json.loads((tmp_path / FAILURE).read_text())
    assert (word["stage"], word["exit_code"]) == ("ingest", 2)
    assert "is a dataset, not a model" in word["message"]
    assert capsys.readouterr().err.splitlines()[-1] == f"error: ingest: {word['message']}"
    assert not (tmp_path / "out").exists()


def test_after_a_failure_no_further_stage_starts(
    ingest_config: IngestConfig, context: RunContext, tmp_path: Path
) -> None:
    (tmp_path / FAILURE).write_text("{}")
    with pytest.raises(SystemExit) as stop:
        ingest(ingest_config, tmp_path / "out")
    assert stop.value.code == 1
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard_is_found_before_anything_runs(
    context: RunContext, ingest_config: IngestConfig, tiny_parent: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_parent, broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    model = Store.at(context.store).add_directory(broken, "model", format="safetensors", producer="test").id
    with pytest.raises(SystemExit):
        ingest(ingest_config.model_copy(update={"parent": model}), tmp_path / "out")
    assert "copy or download it again" in json.loads((tmp_path / FAILURE).read_text())["message"]


@pytest.mark.parametrize(("rows", "message"), [("", "is empty"), ("{}\n[]\n", "line 2"), ("{}\n{,\n", "line 2")])
def test_a_bad_data_set_is_refused(
    rows: str, message: str, context: RunContext, ingest_config: IngestConfig, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text(rows)
    bad = Store.at(context.store).add_file(tmp_path / "bad.jsonl", "dataset", format="jsonl", producer="test").id
    with pytest.raises(SystemExit):
        ingest(ingest_config.model_copy(update={"tests": bad}), tmp_path / "out")
    assert message in json.loads((tmp_path / FAILURE).read_text())["message"]


def test_scratch_survives_a_failure_and_not_a_success(
    ingest_config: IngestConfig, context: RunContext, tiny_parent: Path, tmp_path: Path
) -> None:
    found = choose(tmp_path, tiny_parent, 99)
    inputs = {"parent": ingest(ingest_config, tmp_path / "in")["parent"]} | found
    outputs = artifacts(tmp_path / "out", "child", "metrics")
    with pytest.raises(SystemExit):
        run_stage("prune_model", "{}", inputs, outputs)
    (kept,) = (context.store / "scratch").glob("*/*/")
    assert (kept / "scratch").is_dir()
    assert not Path(outputs["child"].path).exists()


def test_what_a_kill_left_behind_is_swept_and_an_older_output_gives_way(
    ingest_config: IngestConfig, context: RunContext, tmp_path: Path
) -> None:
    half_removed = context.store / "scratch" / str(os.geteuid()) / "key.0123.done"
    for folder in (half_removed, tmp_path / "out" / ".parent.arriving", tmp_path / "out" / "parent"):
        folder.mkdir(parents=True)
        (folder / "left").write_text("")
    ingest(ingest_config, tmp_path / "out")
    assert not half_removed.exists()
    assert sorted(path.name for path in (tmp_path / "out" / "parent").iterdir()) == ["manifest.json", "record.json"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_a_context_survives_the_environment(context: RunContext) -> None:
    assert RunContext.from_environment() == context


def test_without_a_store_the_message_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_STORE", raising=False)
    with pytest.raises(ConfigError, match="MOESAIC_STORE is not set"):
        RunContext.from_environment()

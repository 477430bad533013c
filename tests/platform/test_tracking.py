"""Runs land in MLflow nested under their pipeline's run, with what the record says and nothing from the environment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.core.errors import ConfigError
from moesaic.platform.runs.records import Record
from moesaic.platform.runs.tracking import EXPERIMENT, Tracker, flatten, pipeline_run

RECORD = Record(
    stage="evaluate",
    subject="greedy",
    config={"efforts": ["low"], "space": {"windows": [8]}},
    config_digest="c",
    inputs={"model": "m"},
    versions={},
    code_digest="d",
    hardware={},
    seed=3,
    metrics={"accuracy": 0.75},
    started="2026-01-01T00:00:00+00:00",
    duration_s=1.0,
    peak_memory_mib=10.0,
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: bytes) -> str:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    path.write_bytes(empty_mlflow)
    return f"sqlite:///{path}"


def test_flatten_by_hand() -> None:
    assert flatten({"a": 1, "b": {"c": [8], "d": {"e": "text"}}, "f": {}}) == {
        "a": "1",
        "b.c": "[8]",
        "b.d.e": "text",
        "f": "{}",
    }


def test_stages_nest_under_their_pipeline(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correct-horse")
    RECORD.write(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"never logged")
    with pipeline_run(uri, "search (tiny)", {"version": "1", "evaluate_config": "{}"}, "digest-1") as parent:
        Tracker(uri, parent).log_stage(RECORD, 0, sorted(tmp_path.iterdir()))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert run.info.run_name == "evaluate (greedy)"
    assert run.info.status == client.get_run(parent).info.status == "FINISHED"
    assert run.data.metrics == {"accuracy": 0.75}
    assert run.data.params == {"efforts": '["low"]', "space.windows": "[8]"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["record.json"]
    database = Path(uri.removeprefix("sqlite:///"))
    assert b"correct-horse" not in database.read_bytes()
    logged = database.parent / "mlflow-artifacts" / run.info.run_id / "artifacts" / "record.json"
    assert json.loads(logged.read_text())["seed"] == 3


def test_the_same_arguments_go_on_in_the_same_run(uri: str) -> None:
    from mlflow import MlflowClient

    with pytest.raises(ConfigError), pipeline_run(uri, "search", {}, "digest-2") as first:
        raise ConfigError("stops half-way")
    assert MlflowClient(uri).get_run(first).info.status == "FAILED"
    with pipeline_run(uri, "search", {}, "digest-2") as again, pipeline_run(uri, "search", {}, "digest-3") as other:
        assert again == first
        assert other != first


def test_a_failed_stage_is_logged_with_its_error(uri: str) -> None:
    from mlflow import MlflowClient

    with pipeline_run(uri, "search", {}, "digest-4") as parent:
        Tracker(uri, parent).log_failure("prune_model", "puzzle", 0, {"candidate": "puzzle"}, ConfigError("no such"))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert run.info.status == "FAILED"
    assert run.data.tags["moesaic.error"] == "ConfigError: no such"


def test_a_run_that_a_scheduler_opened_is_used_and_left_open(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    given = client.create_run(experiment.experiment_id).info.run_id
    Tracker(uri, run_id=given).log_stage(RECORD, 0, [])
    assert client.get_run(given).data.metrics == {"accuracy": 0.75}
    assert client.get_run(given).info.status == "RUNNING"


def test_a_run_begun_before_its_stage_is_the_same_after_a_kill_and_ends_with_the_stage(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    killed = Tracker(uri, attempt="a").begin("distill", "puzzle", 0)
    assert killed.live_run_id and client.get_run(killed.live_run_id).info.status == "RUNNING"
    again = Tracker(uri, attempt="a").begin("distill", "puzzle", 0)
    assert again.live_run_id == killed.live_run_id
    again.log_stage(RECORD, 0, [])
    run = client.get_run(again.live_run_id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"accuracy": 0.75}


def test_an_attempt_that_failed_and_then_succeeds_is_one_run_without_the_error(uri: str) -> None:
    from mlflow import MlflowClient

    client, attempt = MlflowClient(uri), Tracker(uri, attempt="b")
    attempt.log_failure("evaluate", "greedy", 0, RECORD.config, ConfigError("no such"))
    attempt.log_stage(RECORD, 0, [])
    attempt.log_stage(replace(RECORD, metrics={"accuracy": 0.5}), 0, [])
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], "tags.`moesaic.attempt` = 'b'")
    assert run.info.status == "FINISHED" and "moesaic.error" not in run.data.tags
    assert run.data.metrics == {"accuracy": 0.5}, "the latest counts, not the greatest"


def test_a_lost_server_costs_a_warning_and_not_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    Tracker(f"sqlite:///{tmp_path}/file/mlflow.db").log_stage(RECORD, 0, [])
    assert "warning: evaluate: not logged to MLflow" in capsys.readouterr().err


def test_without_a_uri_nothing_is_logged() -> None:
    Tracker().log_stage(RECORD, 0, [])

"""Stages whose MLflow server was never there, hangs, or dies while they run: the work is kept and logged later."""

import json
import os
import signal
import socket
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.command_line.main import main
from moesaic.core.errors import StageError
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.records import Record
from moesaic.platform.runs.runtime import run_stage
from moesaic.platform.runs.tracking import EXPERIMENT, pipeline_run
from moesaic.platform.store import Store
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.recover.training import OptimizerConfig
from tests.data_sets import add_sets

from .mlflow_server import ADMIN, PASSWORD, MlflowServer, free_port

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SETS = ("calibration_short", "calibration_long", "prompts", "tests")
POLICY = ReinforceConfig(
    efforts=("low",),
    steps=12,
    prompts_per_step=4,
    generations_per_prompt=4,
    replies_per_forward=16,
    max_new_tokens=8,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    checkpoint_every_steps=100,
    precision="float32",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "TIMEOUT"):  # so that what tracking sets is undone after the test
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    monkeypatch.setenv("MOESAIC_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return tmp_path


def ingest(parent: Path, place: Path, output: str) -> Record:
    """The quickest stage there is."""
    store = Store.at(place / "store")
    model = store.add_directory(parent, "model", format="safetensors", producer="test").id
    config = IngestConfig(parent=model, **add_sets(store, place / "data"))
    outputs: Any = {name: SimpleNamespace(path=str(place / output / name)) for name in ("parent", *SETS)}
    run_stage("ingest", config.to_json(), {}, outputs)
    return Record.read(place / output / "parent")


def waiting(place: Path) -> list[dict[str, Any]]:
    store = Store.at(place / "store")
    return [json.loads(store.root.read(item.key)) for item in store.root.items("unlogged/")]


def only_key(place: Path) -> str:
    (item,) = Store.at(place / "store").root.items("unlogged/")
    return item.key


def logged(server: MlflowServer, stage: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], f"tags.`moesaic.stage` = '{stage}'"))


@pytest.mark.timeout(200)  # a client with MLflow's own patience asks seven times for 120 s
@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_without_a_server_a_stage_is_done_and_its_log_waits(
    kind: str, tiny_parent: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as never_answers:
        never_answers.bind(("127.0.0.1", 0))
        if kind == "is silent":
            never_answers.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{never_answers.getsockname()[1]}")
        record = ingest(tiny_parent, place, "out")
    (log,) = waiting(place)
    assert (log["stage"], log["status"], log["metrics"]) == ("ingest", "FINISHED", record.metrics)
    told = capsys.readouterr().err
    assert "warning: ingest: not logged to MLflow" in told and "moesaic store send-logs" in told
    assert PASSWORD not in (place / "store" / only_key(place)).read_text()


def test_a_server_killed_under_a_training_stage_costs_nothing_but_time(
    mlflow_server: MlflowServer,
    tiny_parent: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    with pipeline_run(mlflow_server.uri, "recover", {}, "digest") as pipeline:
        monkeypatch.setenv("MOESAIC_PARENT_RUN_ID", pipeline)
        stage = get_context("fork").Process(target=run_reinforce, args=(tiny_parent, place))
        stage.start()
        curves = place / "store" / "scratch" / str(os.geteuid())
        while stage.is_alive() and not any(path.stat().st_size for path in curves.glob("*/scratch/training.jsonl")):
            time.sleep(0.02)
        mlflow_server.stop(signal.SIGKILL)
        assert stage.is_alive(), "the stage ended before its server could be killed"
        stage.join(timeout=120)
        assert stage.exitcode == 0
    assert "recover: its run stays open in MLflow" in capsys.readouterr().err
    policy = Record.read(place / "policy")
    assert [log["metrics"] for log in waiting(place)] == [policy.metrics]
    assert main(["store", "send-logs"]) == 1
    assert "did not take 1 runs; they stay in the store" in capsys.readouterr().err

    mlflow_server.start()
    (run,) = logged(mlflow_server, "reinforce")
    assert run.info.status == "RUNNING" and run.data.params == {}
    key, content = only_key(place), Store.at(place / "store").root.read(only_key(place))
    ingest(tiny_parent, place, "out")
    assert "ingest: logged 1 earlier runs to MLflow, 0 still wait" in capsys.readouterr().err
    assert waiting(place) == []
    (run,) = logged(mlflow_server, "reinforce")
    assert run.info.status == "FINISHED" and run.data.params["steps"] == "12"
    assert run.data.tags["mlflow.parentRunId"] == pipeline
    assert run.data.metrics.items() >= policy.metrics.items()
    assert run.info.end_time < logged(mlflow_server, "ingest")[0].info.start_time, "it ended when it ended"

    Store.at(place / "store").root.write(key, content)
    for told in ("1 runs logged; 0 still wait", "0 runs logged; 0 still wait"):
        assert main(["store", "send-logs"]) == 0
        assert told in capsys.readouterr().out
    (again,) = logged(mlflow_server, "reinforce")
    assert again.data.metrics == run.data.metrics, "telling it twice changes nothing"


def test_a_pipeline_does_not_begin_without_its_server() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StageError, match="nothing has run yet"), pipeline_run(nobody, "compress", {}, "digest"):
        raise AssertionError("it began")


def test_what_waits_for_another_server_is_not_sent(
    tiny_parent: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    ingest(tiny_parent, place, "out")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert main(["store", "send-logs"]) == 0
    assert "0 runs logged; 0 still wait, and 1 for other addresses" in capsys.readouterr().out
    assert len(waiting(place)) == 1


def run_reinforce(parent: Path, place: Path) -> None:
    """A process of the stage, with inputs that a random model can learn from."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork has none of this process's other threads
    rows = [
        {
            "id": f"p{index}",
            "task": "t",
            "prompt": [{"role": "user", "content": f"w{index}"}],
            "answer": "w1",
            "verifier": "exact_match",
        }
        for index in range(8)
    ]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "traces").mkdir()
    replies = {"accuracy": 0.5, "tokens_per_request": 4.0}
    (place / "traces" / "summary.json").write_text(json.dumps({"efforts": {"low": {"tasks": {"t": replies}}}}))
    inputs = {"model": str(parent), "prompts": str(place / "prompts.jsonl"), "traces": str(place / "traces")}
    artifacts: list[Any] = [
        {name: SimpleNamespace(path=path) for name, path in group.items()}
        for group in (inputs, {"policy": str(place / "policy")})
    ]
    run_stage("reinforce", POLICY.to_json(), *artifacts)

"""Secrets of the environment appear nowhere: not in what is printed, nor in records, runs or pipelines."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.command_line.main import main
from moesaic.core.errors import ConfigError, StageError
from moesaic.core.redaction import holds_password, names_secret, redact
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.runtime import FAILURE, run_stage
from moesaic.platform.runs.tracking import EXPERIMENT
from moesaic.platform.store import Store
from moesaic.stages import find_stage
from pipelines.compiling import compile_all
from tests.data_sets import add_sets

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA-nobody-shows-this",
    "AWS_SECRET_ACCESS_KEY": "s3+secret/nobody=shows",
    "AWS_SESSION_TOKEN": "session-nobody-shows",
    "HF_TOKEN": "hf_nobody_shows",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-nobody-shows",
}
IN_ADDRESS = "in-an-address-nobody-shows"


@pytest.mark.parametrize(
    ("variable", "holds"),
    [
        *((name, True) for name in SECRETS),
        ("WANDB_API_KEY", True),
        ("GOOGLE_CREDENTIALS", True),
        ("MOESAIC_S3_KMS_KEY", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
        ("MOESAIC_STORE", False),
        ("MLFLOW_TRACKING_USERNAME", False),
    ],
)
def test_names_tell_which_variables_hold_secrets(variable: str, holds: bool) -> None:
    assert names_secret(variable) == holds


def test_secrets_and_passwords_of_addresses_become_stars() -> None:
    environment = {"A_TOKEN": "abcdef", "B_TOKEN": "abcdefgh", "C_TOKEN": "12345", "URL": "http://u:password@h/p"}
    assert redact("abcdefgh abcdef 12345 password", environment) == "*** *** 12345 ***"
    assert redact("http://user:word@host:80/a, s3://bucket/a@b", {}) == "http://user:***@host:80/a, s3://bucket/a@b"
    assert holds_password("postgresql://mlflow:x@db:5432/mlflow") and not holds_password("http://host:5000/@x")


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AIPERF_URL", f"http://user:{IN_ADDRESS}@host")
    return [*SECRETS.values(), IN_ADDRESS]


def _written_under(directory: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def _artifacts(directory: Path, *names: str) -> dict[str, Any]:
    return {name: SimpleNamespace(path=str(directory / name)) for name in names}


def test_a_failure_that_quotes_secrets_is_told_without_them(
    secrets: list[str],
    empty_mlflow: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a client of a server might: the whole environment is in its message, and in MLflow as the stage's error."""
    from mlflow import MlflowClient

    def fail(*_: object, **__: object) -> dict[str, float]:
        raise kinds[-1](f"no answer for {' '.join(secrets)}")

    (tmp_path / "mlflow.db").write_bytes(empty_mlflow)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MOESAIC_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOESAIC_RUN_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("moesaic.platform.ingest.run.run", fail)
    config = '{"parent": "a", "calibration_short": "b", "calibration_long": "c", "prompts": "d", "tests": "e"}'
    kinds: list[type[Exception]] = [StageError, RuntimeError]
    told = []
    while kinds:
        with pytest.raises(SystemExit):
            run_stage("ingest", config, {}, _artifacts(tmp_path / "out", *find_stage("ingest").output_names))
        told += [capsys.readouterr().err, (tmp_path / FAILURE).read_text()]
        (tmp_path / FAILURE).rename(tmp_path / kinds.pop().__name__)
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    told += [run.data.tags["moesaic.error"] for run in runs]
    assert runs and all("no answer for *** ***" in text for text in told)
    everything = _written_under(tmp_path) + "".join(told).encode()
    assert [secret for secret in secrets if secret.encode() in everything] == []


def test_records_and_runs_of_a_stage_hold_nothing_of_the_environment(
    secrets: list[str],
    tiny_parent: Path,
    empty_mlflow: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = Store.at(tmp_path / "store")
    sets = add_sets(store, tmp_path / "data")
    model = store.add_directory(tiny_parent, "model", format="safetensors", producer="test").id
    config = IngestConfig(parent=model, **sets)
    monkeypatch.setenv("MOESAIC_STORE", str(tmp_path / "store"))
    (tmp_path / "mlflow.db").write_bytes(empty_mlflow)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_stage("ingest", config.to_json(), {}, _artifacts(tmp_path / "out", *find_stage("ingest").output_names))
    assert list((tmp_path / "out").rglob("record.json")) and list((tmp_path / "mlflow-artifacts").rglob("record.json"))
    everything = _written_under(tmp_path) + "".join(capsys.readouterr()).encode()
    assert [secret for secret in secrets if secret.encode() in everything] == []


def test_compiled_pipelines_hold_nothing_of_the_environment(secrets: list[str], tmp_path: Path) -> None:
    assert compile_all(tmp_path)
    assert [secret for secret in secrets if secret.encode() in _written_under(tmp_path)] == []


def test_the_command_line_tells_errors_without_secrets(
    secrets: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise ConfigError(f"bad password {secrets[-1]}")

    monkeypatch.setattr("moesaic.command_line.store_commands._ls", refuse)
    assert main(["store", "ls"]) == 2
    assert capsys.readouterr().err == "error: bad password ***\n"

"""Runs in MLflow: one parent run per pipeline run, one nested run per stage. Weights never go there, only records.

A server that is down costs a stage neither its result nor, for long, its time: what it cannot be told waits in the
store under ``unlogged/``, and the next stage that reaches the server sends it, or ``moesaic store send-logs`` does.

MLflow is imported when something is logged, so a stage without tracking does not pay for it.
"""

import base64
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moesaic.core.errors import StageError
from moesaic.core.network import use_site_variables
from moesaic.core.redaction import redact
from moesaic.platform.runs.records import Record
from moesaic.platform.store import Item, Store

EXPERIMENT = "moesaic"
_ARGUMENTS_TAG = "moesaic.arguments"
_ATTEMPT_TAG = "moesaic.attempt"
_ERROR_TAG = "moesaic.error"
_PARENT_TAG = "mlflow.parentRunId"
_PARAM_LENGTH = 500
_SHOWN = 400
_SQLITE = "sqlite:///"
_FILES = {".json", ".html", ".png"}
_FILE_BYTES = 8 * 2**20
_WAITING = "unlogged"
_SENDING_S = 60.0
"""The longest that a stage spends on sending the waiting logs of others."""
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Defaults for MLflow's own variables: a server that is down costs seconds, one that hangs a minute."""


@dataclass(frozen=True)
class StageLog:
    """One run of one stage, as MLflow logs it."""

    attempt: str
    """Identifies the run, so that sending the log again updates the same run."""
    stage: str
    subject: str
    started_ms: int
    ended_ms: int
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: Mapping[str, str]
    """Contents of files in base64, by name."""
    parent_run_id: str | None
    run_id: str | None
    """The run that a scheduler opened for the task."""

    def to_json(self) -> str:
        """The file that waits in the store."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Tracker:
    """Logs a stage's run to MLflow; without ``uri`` it does nothing. If the server fails, it only warns."""

    uri: str | None = None
    parent_run_id: str | None = None
    """The run in which a new run is nested."""
    run_id: str | None = None
    """The run that a scheduler opened for the task; the stage logs into it."""
    store: Store | None = None
    """The store in which a log waits while the server cannot take it."""
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identifies the run even after a killed process: the same attempt logs into the same run."""
    begun_id: str | None = None
    """The run that :meth:`begin` opened."""

    @property
    def live_run_id(self) -> str | None:
        """The run that exists while the stage runs, for engines that log their training curve as it grows."""
        return self.run_id or self.begun_id

    def begin(self, stage: str, subject: str, started_ms: int) -> "Tracker":
        """Open the stage's run before it starts, or the one that a killed attempt opened."""
        if self.uri is None or self.run_id is not None:
            return self
        try:
            client, experiment_id = _connect(self.uri)
            log = self._describe(stage, subject, started_ms, "RUNNING")
            run_id = _find_or_open(client, experiment_id, log)
            client.update_run(run_id, status="RUNNING")
            return replace(self, begun_id=run_id)
        except Exception as lost:
            _warn(stage, f"its curve is not logged to MLflow: {type(lost).__name__}")
            return self

    def log_stage(self, record: Record, started_ms: int, files: Sequence[Path]) -> None:
        """Log a finished stage: its config as params, its metrics, and small files such as its record."""
        small = [path for path in files if path.suffix in _FILES and path.stat().st_size <= _FILE_BYTES]
        self._log(
            replace(
                self._describe(record.stage, record.subject, started_ms, "FINISHED"),
                params=flatten(record.config),
                metrics=record.metrics,
                files={path.name: base64.b64encode(path.read_bytes()).decode() for path in small},
            )
        )

    def log_failure(
        self, stage: str, subject: str, started_ms: int, config: Mapping[str, Any], failure: Exception
    ) -> None:
        """Log a stage that failed, with its config and its error."""
        error = redact(f"{type(failure).__name__}: {failure}", os.environ)
        log = self._describe(stage, subject, started_ms, "FAILED")
        self._log(replace(log, params=flatten(config), tags={_ERROR_TAG: error}))

    def send_waiting(self, limit_s: float = _SENDING_S) -> tuple[int, int]:
        """Send the logs that wait for this server; returns how many were sent and how many still wait.

        No new one is begun after ``limit_s``. Logs that another process has sent meanwhile are not counted.
        """
        if self.uri is None or self.store is None:
            return 0, 0
        sent = kept = 0
        deadline = time.monotonic() + limit_s
        for item in list(self.store.root.items(f"{_WAITING}/{_digest(self.uri)}/")):
            was_sent = self._send(item) if time.monotonic() < deadline else False
            sent, kept = sent + (was_sent is True), kept + (was_sent is False)
        return sent, kept

    def _describe(self, stage: str, subject: str, started_ms: int, status: str) -> StageLog:
        now_ms, ids = time.time_ns() // 10**6, (self.parent_run_id, self.run_id)
        return StageLog(self.attempt, stage, subject, started_ms, now_ms, status, {}, {}, {}, {}, *ids)

    def _log(self, log: StageLog) -> None:
        if self.uri is None:
            return
        try:
            _write(self.uri, log)
        except Exception as lost:
            _warn(log.stage, f"not logged to MLflow: {type(lost).__name__}{self._keep(log)}")
            return
        self._send_waiting_too(log.stage)

    def _keep(self, log: StageLog) -> str:
        """Put a log into the store to wait. The key has its status: a success and an earlier failure differ."""
        if self.uri is None or self.store is None:
            return ""
        key = f"{_WAITING}/{_digest(self.uri)}/{log.attempt}-{log.status}.json"
        try:
            self.store.root.write(key, log.to_json().encode())
        except Exception as failure:
            return f"; nor could it be kept: {type(failure).__name__}"
        return f"; kept as {key} in the store, for the next stage or `moesaic store send-logs` to send"

    def _send_waiting_too(self, stage: str) -> None:
        try:
            sent, kept = self.send_waiting()
        except Exception as lost:
            _warn(stage, f"what waits to be logged cannot be listed: {type(lost).__name__}")
            return
        if sent or kept:
            print(f"{stage}: logged {sent} earlier runs to MLflow, {kept} still wait", file=sys.stderr, flush=True)

    def _send(self, item: Item) -> bool | None:
        """Send a waiting log; returns whether it was sent, or None if it no longer waits."""
        assert self.uri is not None and self.store is not None, "something waits"
        try:
            log = StageLog(**json.loads(self.store.root.read(item.key)))
        except FileNotFoundError:
            return None
        try:
            _write(self.uri, log)
        except Exception as lost:
            _warn(log.stage, f"still not logged to MLflow: {type(lost).__name__}")
            return False
        self.store.root.delete(item)
        return True


def count_waiting(store: Store) -> int:
    """The number of logs that wait in a store, for all servers."""
    return sum(1 for _ in store.root.items(f"{_WAITING}/"))


@contextmanager
def pipeline_run(uri: str, name: str, arguments: Mapping[str, Any], arguments_digest: str) -> Iterator[str]:
    """The id of a pipeline run's parent run: a new one, or the one that the same arguments opened before.

    Raises:
        StageError: if MLflow cannot be reached, before anything has run. At the end that costs only a warning.
    """
    try:
        client, experiment_id = _connect(uri)
        run_id = _find_or_open_parent(client, experiment_id, name, arguments, arguments_digest)
    except Exception as lost:
        said = redact(" ".join(str(lost).split()), os.environ)[:_SHOWN]
        raise StageError(
            f"MLflow at {redact(uri, {})} cannot be used ({type(lost).__name__}: {said}) and nothing has run yet; "
            "start it, correct its address or the user (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, "
            "MLFLOW_TRACKING_TOKEN), or unset MLFLOW_TRACKING_URI to log into a file beside the run"
        ) from lost
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    finally:
        try:
            client.set_terminated(run_id, status)
        except Exception as lost:
            _warn(name, f"its run stays open in MLflow ({type(lost).__name__}); the same command again closes it")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as dotted names: ``{"space": {"windows": [8]}}`` is ``{"space.windows": "[8]"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _write(uri: str, log: StageLog) -> None:
    """Write a log to MLflow; writing it again changes nothing."""
    client, experiment_id = _connect(uri)
    run_id = log.run_id or _find_or_open(client, experiment_id, log)
    _log_values(client, run_id, log.params, log.metrics, log.tags, log.ended_ms)
    if log.status == "FINISHED" and _ERROR_TAG in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, _ERROR_TAG)  # of an attempt before this one
    for name, content in log.files.items():
        _log_file(client, run_id, name, base64.b64decode(content))
    if log.run_id is None:
        client.set_terminated(run_id, log.status, log.ended_ms)


def _find_or_open(client: Any, experiment_id: str, log: StageLog) -> str:
    runs = client.search_runs([experiment_id], f"tags.`{_ATTEMPT_TAG}` = '{log.attempt}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    name = f"{log.stage} ({log.subject})" if log.subject else log.stage
    tags = {"moesaic.stage": log.stage, "moesaic.subject": log.subject, _ATTEMPT_TAG: log.attempt}
    if log.parent_run_id:
        tags[_PARENT_TAG] = log.parent_run_id
    return _known(client.create_run(experiment_id, start_time=log.started_ms, run_name=name, tags=tags).info.run_id)


def _find_or_open_parent(
    client: Any, experiment_id: str, name: str, arguments: Mapping[str, Any], arguments_digest: str
) -> str:
    runs = client.search_runs([experiment_id], f"tags.`{_ARGUMENTS_TAG}` = '{arguments_digest}'", max_results=1)
    if runs:
        run_id = str(runs[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        return run_id
    tags = {_ARGUMENTS_TAG: arguments_digest}
    run_id = _known(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    _log_values(client, run_id, flatten(arguments))
    return run_id


def _connect(uri: str) -> tuple[Any, str]:
    """A client and the id of the experiment; with a local database, artifacts lie in a folder beside it."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    use_site_variables()
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return client, _known(experiment.experiment_id)
    beside = None
    if uri.startswith(_SQLITE):
        beside = Path(uri.removeprefix(_SQLITE)).absolute().with_name("mlflow-artifacts").as_uri()
    return client, _known(client.create_experiment(EXPERIMENT, artifact_location=beside))


def _known(answered: str) -> str:
    """The id in an answer; MLflow's client reads an answer that is no such one as an object without it."""
    if not answered:
        raise StageError("what answers there is no MLflow, maybe a page to log in")
    return answered


def _log_values(
    client: Any,
    run_id: str,
    params: Mapping[str, str],
    metrics: Mapping[str, float] = MappingProxyType({}),
    tags: Mapping[str, str] = MappingProxyType({}),
    timestamp_ms: int = 0,
) -> None:
    """Log values; of several attempts MLflow shows the one with the latest time."""
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        metrics=[Metric(name, value, timestamp_ms, 0) for name, value in metrics.items()],
        params=[Param(name, value[:_PARAM_LENGTH]) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )


def _log_file(client: Any, run_id: str, name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / name).write_bytes(content)
        client.log_artifact(run_id, str(Path(directory) / name))


def _digest(uri: str) -> str:
    """A digest instead of the server's address, which may hold a password."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def _warn(about: str, what: str) -> None:
    print(f"warning: {about}: {what}", file=sys.stderr, flush=True)

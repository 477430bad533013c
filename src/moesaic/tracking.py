"""Runs in MLflow: one parent run per pipeline run, one nested run per stage. Weights never go there, only records.

MLflow is imported when something is logged, so a stage without tracking does not pay for it.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.records import Record

EXPERIMENT = "moesaic"
_ARGUMENTS_TAG = "moesaic.arguments"
_PARENT_TAG = "mlflow.parentRunId"
_PARAM_LENGTH = 500
_SQLITE = "sqlite:///"
_FILES = {".json", ".html", ".png"}
_FILE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Tracker:
    """Where a stage's run is logged; nowhere without ``uri``. A server that fails costs a warning, never a result."""

    uri: str | None = None
    parent_run_id: str | None = None
    """Nest a new run in this one."""
    run_id: str | None = None
    """Log into this run, which a scheduler opened for the very task."""
    begun_id: str | None = None
    """Log into this run and end it; see :meth:`begin`."""

    @property
    def live_run_id(self) -> str | None:
        """The run that exists while the stage runs, for engines that log their training curve as it grows."""
        return self.run_id or self.begun_id

    def begin(self, stage: str, subject: str, started_ms: int, note: Path) -> "Tracker":
        """Open the stage's run before it starts, or the one that a killed attempt opened and left in ``note``."""
        if self.uri is None or self.run_id is not None:
            return self
        try:
            client, experiment_id = _connect(self.uri)
            if note.is_file():
                client.update_run(note.read_text(), status="RUNNING")
            else:
                note.write_text(self._open_run(client, experiment_id, stage, subject, started_ms))
            return replace(self, begun_id=note.read_text())
        except Exception as lost:
            _warn(stage, lost)
            return self

    def log_stage(self, record: Record, started_ms: int, files: Sequence[Path]) -> None:
        """Log a finished stage: its config as params, its metrics, and small files such as its record."""
        small = [path for path in files if path.suffix in _FILES and path.stat().st_size <= _FILE_BYTES]
        self._log(record.stage, record.subject, started_ms, "FINISHED", record.config, record.metrics, small)

    def log_failure(
        self, stage: str, subject: str, started_ms: int, config: Mapping[str, Any], failure: Exception
    ) -> None:
        """Log a stage that failed, with its config and its error."""
        error = f"{type(failure).__name__}: {failure}"
        self._log(stage, subject, started_ms, "FAILED", config, {}, [], {"moesaic.error": error})

    def _log(
        self,
        stage: str,
        subject: str,
        started_ms: int,
        status: str,
        config: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Sequence[Path],
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if self.uri is None:
            return
        try:
            client, experiment_id = _connect(self.uri)
            run_id = self.live_run_id or self._open_run(client, experiment_id, stage, subject, started_ms)
            _log_values(client, run_id, flatten(config), metrics, tags or {})
            for path in files:
                client.log_artifact(run_id, str(path))
            if self.run_id is None:
                client.set_terminated(run_id, status)
        except Exception as lost:
            _warn(stage, lost)

    def _open_run(self, client: Any, experiment_id: str, stage: str, subject: str, started_ms: int) -> str:
        name = f"{stage} ({subject})" if subject else stage
        tags = {"moesaic.stage": stage, "moesaic.subject": subject}
        if self.parent_run_id:
            tags[_PARENT_TAG] = self.parent_run_id
        run_id: str = client.create_run(experiment_id, start_time=started_ms, run_name=name, tags=tags).info.run_id
        return run_id


def _warn(stage: str, lost: Exception) -> None:
    print(f"warning: {stage}: not logged to MLflow: {type(lost).__name__}", file=sys.stderr, flush=True)


@contextmanager
def pipeline_run(uri: str, name: str, arguments: Mapping[str, Any], arguments_digest: str) -> Iterator[str]:
    """The id of a pipeline run's parent run: a new one, or the one that the same arguments opened before."""
    client, experiment_id = _connect(uri)
    found = client.search_runs([experiment_id], f"tags.`{_ARGUMENTS_TAG}` = '{arguments_digest}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(experiment_id, run_name=name, tags={_ARGUMENTS_TAG: arguments_digest}).info.run_id
        _log_values(client, run_id, flatten(arguments), {}, {})
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as dotted names: ``{"space": {"windows": [8]}}`` is ``{"space.windows": "[8]"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _connect(uri: str) -> tuple[Any, str]:
    """A client and the id of the experiment; with a local database, artifacts lie in a folder beside it."""
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return client, experiment.experiment_id
    beside = None
    if uri.startswith(_SQLITE):
        beside = Path(uri.removeprefix(_SQLITE)).absolute().with_name("mlflow-artifacts").as_uri()
    return client, client.create_experiment(EXPERIMENT, artifact_location=beside)


def _log_values(
    client: Any, run_id: str, params: Mapping[str, str], metrics: Mapping[str, float], tags: Mapping[str, str]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
        params=[Param(name, value[:_PARAM_LENGTH]) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )

"""Runs one stage: Kubeflow components call it through ``run_stage``, ``moesaic stage`` through ``perform``.

A stage sees plain directories. This module resolves its inputs, keeps a scratch directory that survives a killed run,
moves the finished output into place, writes the record and logs to MLflow.
"""

import gc
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moesaic.core import code
from moesaic.core.child_processes import end_with
from moesaic.core.config import Config
from moesaic.core.errors import ArtifactError, ConfigError, MoesaicError
from moesaic.core.files import explained_file_errors, locked, make_folder, write_text_atomically
from moesaic.core.network import use_site_variables
from moesaic.core.redaction import redact
from moesaic.core.stage import Stage
from moesaic.core.user_name import user_variables
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
from moesaic.platform.registry.registry import RegistryAddress
from moesaic.platform.runs import records
from moesaic.platform.runs.lineage import keep_record
from moesaic.platform.runs.records import RECORD, Record
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.runs.tracking import Tracker
from moesaic.platform.store import Address, Manifest, Store
from moesaic.platform.store.manifest import MANIFEST
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.stages import find_stage

FAILURE = "failure.json"
"""The file that a failed stage writes into the run's directory; the command line reads it."""

_DONE = ".done"
"""Suffix of the scratch directory of a finished stage while it is removed."""

_GC_THRESHOLDS = (100_000, 50, 50)
"""Thresholds of the garbage collector; at Python's defaults it takes a quarter of the time of the imports."""

Result = TypeVar("Result")
Given = Mapping[str, Path | list[Path]]
"""Input directories by name; a list where a stage takes any number of them."""


class ArtifactPath(Protocol):
    """The part of a Kubeflow artifact that is used here."""

    @property
    def path(self) -> str:
        """Its path in this container."""


@dataclass(frozen=True)
class StageRun:
    """One stage with its config and checked inputs, ready to run."""

    stage: Stage
    config: Config
    inputs: Given
    """Directories with the files themselves, manifests resolved."""
    digests: Mapping[str, str | list[str]]
    """Content digests of the inputs."""
    origins: Mapping[str, str | list[str]]
    """How the inputs were made, see :attr:`moesaic.platform.runs.records.Record.origin`."""
    parents: tuple[str, ...]
    """Ids of the manifests among the inputs."""
    subject: str
    """The model that the run is about, see :class:`moesaic.platform.runs.records.Record`."""

    @property
    def key(self) -> str:
        """Digest of all that decides the result: stage, config, inputs, code."""
        decisive = [self.stage.name, self.config.digest, dict(self.digests), code.code_digest()]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def run_stage(
    name: str, config: str, inputs: Mapping[str, ArtifactPath | list[Any] | None], outputs: Mapping[str, ArtifactPath]
) -> None:
    """Run a stage inside a Kubeflow task: artifacts in, artifacts and metrics out.

    Raises:
        SystemExit: with the error's exit code, if it failed; all that is printed of it is free of secrets.
    """
    gc.set_threshold(*_GC_THRESHOLDS)
    use_site_variables()
    context = RunContext.from_environment()
    if context.driver_pid:
        end_with(context.driver_pid)
    if context.run_directory and (context.run_directory / FAILURE).exists():
        raise SystemExit(MoesaicError.exit_code)  # Another stage of this run has failed.
    try:
        given = {key: _paths(value) for key, value in inputs.items() if value is not None}
        with explained_file_errors(Path.cwd()):
            run = plan_stage(name, config, given, Store.at(context.store))
            record = _run_in_store(
                context, run, {key: Path(value.path) for key, value in outputs.items() if key != "metrics"}
            )
    except MoesaicError as failure:
        _write_failure(context, name, str(failure), failure.exit_code)
        raise SystemExit(failure.exit_code) from failure
    except Exception as failure:
        print(redact(traceback.format_exc(), os.environ), file=sys.stderr, end="")
        _write_failure(context, name, f"{type(failure).__name__}: {failure}", MoesaicError.exit_code)
        raise SystemExit(MoesaicError.exit_code) from failure
    if "metrics" in outputs:
        _write_metrics(record.metrics, outputs["metrics"])


def plan_stage(name: str, config: str, given: Given, store: Store | None) -> StageRun:
    """Check a stage's name, config and inputs before anything is run.

    Raises:
        ConfigError: for an unknown stage, a bad config, or inputs the stage does not take.
        ArtifactError: for inputs that are not there.
    """
    stage = find_stage(name)
    parsed = stage.config.parse(config)
    missing = sorted(set(stage.required) - set(given))
    unknown = sorted(set(given) - set(stage.required) - set(stage.optional))
    if missing or unknown:
        allowed = f"{list(stage.required)}" + (f" and may take {list(stage.optional)}" if stage.optional else "")
        raise ConfigError(f"{name} takes the inputs {allowed}; missing: {missing}, unknown: {unknown}")
    return StageRun(
        stage=stage,
        config=parsed,
        inputs={
            key: _each(partial(_resolve, store=store, by_manifest=key in stage.by_manifest), value)
            for key, value in given.items()
        },
        digests={key: _each(records.content_digest, value) for key, value in given.items()},
        origins={key: _each(records.origin_of, value) for key, value in given.items()},
        parents=tuple(
            sorted(
                {Manifest.read(path).id for value in given.values() for path in _listed(value) if _is_manifest(path)}
            )
        ),
        subject=_subject(stage, parsed, given),
    )


def perform(
    run: StageRun,
    output: Path,
    scratch: Path,
    store: Address | None = None,
    registry: RegistryAddress | None = None,
    job: JobSettings | None = None,
) -> Record:
    """Run a planned stage's function on directories and write the record beside its payload."""
    extra = _services(run.stage, store, registry)
    if job:
        extra |= {"nodes": ClusterJob(job, run.key)}
    for name, value in user_variables().items():
        os.environ.setdefault(name, value)
    started, clock = datetime.now(UTC), time.monotonic()
    with explained_file_errors(output):
        metrics = run.stage.run(run.config, **run.inputs, **extra, output=output, scratch=scratch)
        record = Record(
            stage=run.stage.name,
            subject=run.subject,
            config=run.config.model_dump(mode="json"),
            config_digest=run.config.digest,
            inputs=run.digests,
            versions=records.installed_versions(),
            code_digest=code.code_digest(),
            hardware=records.describe_hardware(),
            seed=getattr(run.config, "seed", None),
            metrics=metrics,
            started=started.isoformat(timespec="seconds"),
            duration_s=round(time.monotonic() - clock, 3),
            peak_memory_mib=round(records.peak_memory_mib(), 1),
            origins=run.origins,
        )
        record.write(output)
    return record


def _services(stage: Stage, store: Address | None, registry: RegistryAddress | None) -> dict[str, Any]:
    """The store and the registry, for a stage that uses them."""
    if stage.reads_store and store is None:
        raise ConfigError(f"{stage.name} reads the store; name it with --store or MOESAIC_STORE")
    if stage.reads_registry and registry is None:
        raise ConfigError(f"{stage.name} needs a model registry; set MLFLOW_TRACKING_URI to MLflow's address")
    return ({"store": store} if stage.reads_store else {}) | ({"registry": registry} if stage.reads_registry else {})


def baselines_of(architecture: str) -> list[str]:
    """Configs of ``prune_model`` for every candidate in an architecture.json that is not the search's own."""
    candidates = json.loads((Path(architecture) / "architecture.json").read_text())["candidates"]
    return [PruneModelConfig(candidate=name).to_json() for name in candidates if not name.startswith("puzzle")]


def _run_in_store(context: RunContext, run: StageRun, targets: Mapping[str, Path]) -> Record:
    """Run in a scratch directory of the store's local part, log, and move the result to where the artifacts lie."""
    store = Store.at(context.store)
    started_ms, clock = time.time_ns() // 10**6, time.monotonic()
    _say(run, "started")
    with _workspace(store.directory, run.key) as workspace:
        output = workspace / "output"
        tracker = Tracker(
            context.tracking_uri, context.parent_run_id, context.run_id, store, _attempt(context, run, workspace)
        )
        if run.stage.trains:
            tracker = tracker.begin(run.stage.name, run.subject, started_ms)
            if tracker.live_run_id:
                os.environ["MLFLOW_RUN_ID"] = tracker.live_run_id  # Training engines log their curves into this run.
        try:
            record = perform(run, output, workspace / "scratch", context.store, context.registry, context.job)
        except Exception as failure:
            tracker.log_failure(run.stage.name, run.subject, started_ms, run.config.model_dump(mode="json"), failure)
            raise
        if run.stage.makes_weights:
            _exchange_for_manifest(store, run, output)
        tracker.log_stage(record, started_ms, [path for path in output.iterdir() if path.is_file()])
        _move_outputs(run.stage, record, output, targets, store)
    _say(run, f"done in {time.monotonic() - clock:.1f} s")
    return record


@contextmanager
def _workspace(store: Path, key: str) -> Iterator[Path]:
    """A directory with an empty ``output`` and a kept ``scratch``, locked by one process and removed after success.

    Each user of a store has workspaces of their own: nobody goes on from what someone else has half made. It is renamed
    before it is removed, so that a half-removed scratch is never taken for that of a killed run.
    """
    directory = store / "scratch" / str(os.geteuid()) / key
    make_folder(directory, store)
    with locked(directory.with_suffix(".lock")):
        for done in directory.parent.glob(f"*{_DONE}"):
            shutil.rmtree(done, ignore_errors=True)
        shutil.rmtree(directory / "output", ignore_errors=True)
        (directory / "output").mkdir(parents=True)
        (directory / "scratch").mkdir(exist_ok=True)
        yield directory
        shutil.rmtree(directory.rename(directory.with_suffix(f".{uuid.uuid4().hex}{_DONE}")), ignore_errors=True)


def _attempt(context: RunContext, run: StageRun, workspace: Path) -> str:
    """The id of the attempt: one for each task of a pipeline run; without a pipeline, one until a success."""
    if context.parent_run_id:
        return hashlib.sha256(f"{context.parent_run_id} {run.key}".encode()).hexdigest()
    note = workspace / "attempt"
    if not note.is_file():
        write_text_atomically(note, uuid.uuid4().hex)
    return note.read_text()


def _exchange_for_manifest(store: Store, run: StageRun, output: Path) -> None:
    """Move the weights into the store and leave their manifest, with the record, in their place."""
    record = (output / RECORD).read_bytes()
    (output / RECORD).unlink()
    manifest = store.add_directory(
        output,
        "model",
        format="safetensors",
        producer=run.stage.name,
        parents=run.parents,
        config_digest=run.config.digest,
        move=True,
    )
    shutil.rmtree(output)
    output.mkdir()
    (output / MANIFEST).write_text(manifest.to_json())
    (output / RECORD).write_bytes(record)


def _move_outputs(stage: Stage, record: Record, output: Path, targets: Mapping[str, Path], store: Store) -> None:
    """Move the payload to the artifacts' paths, and keep each record in the store before that.

    With several outputs, each is a folder of the output directory and a subject of its own.
    """
    for name in stage.output_names:
        source, target = (output / name, targets[name]) if len(stage.output_names) > 1 else (output, targets[name])
        made = replace(record, subject=name) if len(stage.output_names) > 1 else record
        made.write(source)
        keep_record(store, made)
        _move_whole(source, target)


def _move_whole(source: Path, target: Path) -> None:
    """Move a directory, also across disks, so that ``target`` is absent or complete at any time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    arriving, leaving = (target.with_name(f".{target.name}.{word}") for word in ("arriving", "leaving"))
    for left in (arriving, leaving):
        shutil.rmtree(left, ignore_errors=True)
    shutil.move(source, arriving)
    if target.exists():
        target.rename(leaving)
    arriving.rename(target)
    shutil.rmtree(leaving, ignore_errors=True)


def _write_metrics(values: Mapping[str, float], metrics: Any) -> None:
    """Log the metrics to Kubeflow and write a file: Kubeflow's cache never reuses a Metrics artifact without one."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for name, value in finite.items():
        metrics.log_metric(name, value)
    Path(metrics.path).parent.mkdir(parents=True, exist_ok=True)
    Path(metrics.path).write_text(json.dumps(finite, indent=1, sort_keys=True) + "\n")


def _listed(value: Path | list[Path]) -> list[Path]:
    return value if isinstance(value, list) else [value]


def _is_manifest(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _paths(value: ArtifactPath | list[Any]) -> Path | list[Path]:
    return [Path(one.path) for one in value] if isinstance(value, list) else Path(value.path)


def _resolve(path: Path, store: Store | None, by_manifest: bool) -> Path:
    """The directory with the files themselves: a manifest's tree, or the path as it is."""
    if not path.exists():
        raise ArtifactError(f"input {path} does not exist")
    if by_manifest or not _is_manifest(path):
        return path
    if store is None:
        raise ConfigError(f"{path} is a manifest; name the store that holds its files with --store")
    return store.materialize(Manifest.read(path))


def _each(function: Callable[[Path], Result], value: Path | list[Path]) -> Result | list[Result]:
    return [function(path) for path in value] if isinstance(value, list) else function(value)


def _subject(stage: Stage, config: Config, given: Given) -> str:
    """The subject of a stage: ``puzzle`` for the pruned candidate, ``puzzle/distill`` after ``distill``."""
    if stage.model_field:
        return str(getattr(config, stage.model_field))
    models = [path for name in ("model", "child", "policies") if name in given for path in _listed(given[name])]
    before = records.subject_of(models[0]) if models else ""
    if not stage.makes_weights:
        return before
    done = getattr(config, stage.step_field) if stage.step_field else stage.name
    return f"{before.split('/')[0]}/{done}"


def _say(run: StageRun, what: str) -> None:
    about = f" ({run.subject})" if run.subject else ""
    print(f"{run.stage.name}{about}: {what}", file=sys.stderr, flush=True)


def _write_failure(context: RunContext, stage: str, message: str, exit_code: int) -> None:
    """Print why a stage failed and write it for the command line; Kubeflow's local runner does not tell it."""
    message = redact(message, os.environ)
    print(f"error: {stage}: {message}", file=sys.stderr, flush=True)
    if context.run_directory:
        failure = {"stage": stage, "message": message, "exit_code": exit_code}
        (context.run_directory / FAILURE).write_text(json.dumps(failure, indent=1) + "\n")

"""Where a stage runs: the store, MLflow, the directory of the run, and the nodes that a cluster gives it.

:meth:`RunContext.from_environment` alone reads this from environment variables. The options of a bucket are read where
one is opened.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic.core.errors import ConfigError
from moesaic.platform.cluster.jobs import JOB_VARIABLE, JobSettings
from moesaic.platform.registry.registry import RegistryAddress
from moesaic.platform.store import Address, parse_address


@dataclass(frozen=True)
class RunContext:
    """Where a stage runs and what it reports to. It is never part of a config."""

    store: Address
    tracking_uri: str | None = None
    run_id: str | None = None
    """The MLflow run that a scheduler opened for this task."""
    parent_run_id: str | None = None
    """The MLflow run of the pipeline."""
    run_directory: Path | None = None
    """Where to write the file that explains a failure."""
    driver_pid: int | None = None
    """The process that started the task; the task ends when it ends."""
    job: JobSettings | None = None
    """The job with which the cluster gives this stage nodes of its own."""

    @classmethod
    def from_environment(cls) -> "RunContext":
        """Read ``MOESAIC_STORE``, MLflow's own variables, and what a cluster or ``moesaic run`` sets for its tasks."""
        read = os.environ.get
        if not (store := read("MOESAIC_STORE")):
            raise ConfigError("MOESAIC_STORE is not set; set it to the directory or the s3:// address of the store")
        directory, pid, job = read("MOESAIC_RUN_DIRECTORY"), read("MOESAIC_DRIVER_PID"), read(JOB_VARIABLE)
        return cls(
            store=parse_address(store),
            tracking_uri=read("MLFLOW_TRACKING_URI") or None,
            run_id=read("MLFLOW_RUN_ID"),
            parent_run_id=read("MOESAIC_PARENT_RUN_ID"),
            run_directory=Path(directory) if directory else None,
            driver_pid=int(pid) if pid else None,
            job=JobSettings.parse(job) if job else None,
        )

    @classmethod
    def for_local_run(cls, run_directory: Path, store: Address | None) -> "RunContext":
        """Keep everything under one directory, unless the store or ``MLFLOW_TRACKING_URI`` points elsewhere."""
        directory = run_directory.absolute()
        return cls(
            store=store.absolute() if isinstance(store, Path) else directory / "store" if store is None else store,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory / 'mlflow.db'}",
            run_directory=directory,
            driver_pid=os.getpid(),
        )

    @property
    def registry(self) -> RegistryAddress | None:
        """The model registry, at the same address as the runs."""
        return RegistryAddress(self.tracking_uri, self.parent_run_id or self.run_id) if self.tracking_uri else None

    def in_pipeline_run(self, parent_run_id: str) -> "RunContext":
        """The same context for the stages of one pipeline run."""
        return replace(self, parent_run_id=parent_run_id)

    def as_environment(self) -> dict[str, str]:
        """The variables from which :meth:`from_environment` reads the same context."""
        variables = {
            "MOESAIC_STORE": self.store,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_RUN_ID": self.run_id,
            "MOESAIC_PARENT_RUN_ID": self.parent_run_id,
            "MOESAIC_RUN_DIRECTORY": self.run_directory,
            "MOESAIC_DRIVER_PID": self.driver_pid,
            JOB_VARIABLE: self.job.to_variable() if self.job else None,
        }
        return {name: str(value) for name, value in variables.items() if value is not None}

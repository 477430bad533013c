"""Run a stage's command as a job: start it or find it running, show its log, and pass on how it ends.

Jobs are named after the stage, its config and its inputs, and numbered by attempt. A stage that is started again finds
the attempt that still runs and follows it; after one that ended, however it did, it starts the next, which goes on from
the last checkpoint. Only a stage that is told to end deletes its job; ended jobs are left to their time to live.
"""

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.files import written_atomically
from moesaic.core.nodes import Work
from moesaic.core.user_name import user_variables
from moesaic.platform.cluster.jobs.api import JobsApi, Object
from moesaic.platform.cluster.jobs.job_template import JOB_LABEL, render_job
from moesaic.platform.cluster.jobs.settings import JobSettings
from moesaic.platform.cluster.jobs.status import describe_nodes, first_failure, first_node, pod_selector, state_of
from moesaic.platform.cluster.profile import QUEUE_LABEL

_SHOWN_LINES = 20


class _Terminated(StageError):
    """The stage received SIGTERM."""


@dataclass(frozen=True)
class ClusterJob:
    """A Kubernetes job on whose nodes a stage runs its processes."""

    settings: JobSettings
    key: str
    """The key of the stage run, see ``StageRun.key``; the job is named after it."""

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return self.settings.num_nodes

    @property
    def gpus_per_node(self) -> int:
        """The number of GPUs of each node; 0 for nodes without GPUs."""
        return self.settings.gpus_per_node

    @property
    def processes_per_node(self) -> int:
        """One process for each GPU; one process on a node without GPUs."""
        return self.settings.processes_per_node

    def visible(self, name: str, path: Path, scratch: Path) -> Path:
        """Return a path of an input that all nodes see: its own, or that of a copy in ``scratch``.

        Raises:
            ConfigError: if the nodes do not see ``scratch`` either.
        """
        if not self.settings.sees(scratch):
            raise ConfigError(
                f"the nodes of a job do not see {scratch}, only what lies below {', '.join(self.settings.shared)}; let "
                "MOESAIC_STORE or, with a store in a bucket, MOESAIC_CACHE name a directory there"
            )
        return path if self.settings.sees(path) else _copied(path, scratch / "inputs" / name)

    def run(self, work: Work, *, prepare: Callable[[], None], show: Callable[[str], None]) -> None:
        """Run a command on the nodes and wait until it ends.

        Args:
            work: the command.
            prepare: writes what the command reads; called before a job is started, not for one that runs already.
            show: is given every line of the log.

        Raises:
            StageError: if the job fails, saying why; if it was deleted; if this process was told to end.
        """
        api, task = JobsApi(self.settings), self.key[:40]
        attempts = {_attempt(job): job for job in api.jobs(f"{JOB_LABEL}={task}")}
        unfinished = [number for number, job in attempts.items() if _is_unfinished(job)]
        number = max(unfinished) if unfinished else 1 + max(attempts, default=0)
        name = f"{self.settings.template['metadata']['name']}-{self.key[:12]}-{number}"
        try:
            with _raise_on_sigterm():
                if unfinished:
                    _say(f"{self.settings.kind} {name} is there already; following it")
                else:
                    prepare()
                    work.log.unlink(missing_ok=True)
                    environment = user_variables() | dict(work.environment)
                    api.create(render_job(self.settings, name, task, work.command, environment, work.log))
                    _say(f"{self.settings.kind} {name} is created")
                _Follower(api, self.settings, name, work.log, show).wait()
        except (_Terminated, KeyboardInterrupt):
            api.delete(name)
            _say(f"{self.settings.kind} {name} is deleted")
            raise


class _Follower:
    """Follows one job: shows its log and its state until it ends."""

    def __init__(self, api: JobsApi, settings: JobSettings, name: str, log: Path, show: Callable[[str], None]) -> None:
        self._api, self._settings, self._name, self._log = api, settings, name, log
        self._show, self._said, self._pod = show, "", ""
        self._lines: _PodLines | _FileLines | None = None
        if settings.kind == "RayJob":
            self._lines = _FileLines(log)
        else:
            log.write_text("")  # the pod has every line of it

    def wait(self) -> None:
        """Wait until the job is complete; StageError if it fails or disappears."""
        while True:
            job = self._api.job(self._name)
            if job is None:
                raise StageError(f"{self._settings.kind} {self._name} was deleted by someone else before it had ended")
            state, selector = state_of(job), pod_selector(job)
            pods = self._api.pods(selector) if selector and state.phase != "queued" else []
            self._show_new_lines(pods)
            if state.phase == "complete":
                return
            if state.phase == "failed":
                raise StageError(self._explain(state.message, pods))
            waits = state.phase == "queued"
            self._report(self._queue(job) if waits else describe_nodes(pods, self._settings.num_nodes))
            time.sleep(self._settings.poll_s)

    def _queue(self, job: Object) -> str:
        queue = self._settings.template["metadata"]["labels"].get(QUEUE_LABEL)
        if not queue:
            return "is suspended"
        reason = self._api.queue_message(job["metadata"]["uid"])
        return f"waits in the queue {queue}{f': {reason}' if reason else ''}"

    def _report(self, what: str) -> None:
        if what != self._said:
            self._said = what
            _say(f"{self._settings.kind} {self._name}: {what}")

    def _show_new_lines(self, pods: Sequence[Object]) -> None:
        """Show the new lines of the log. A job that was suspended continues in other pods."""
        pod = first_node(pods)
        if pod and pod != self._pod:
            self._pod, self._lines = pod, _PodLines(self._api, pod, self._log)
        for line in self._lines.new() if self._lines else ():
            self._show(line)

    def _explain(self, why: str, pods: Sequence[Object]) -> str:
        message = f"{self._settings.kind} {self._name} failed: {why}"
        if ended := first_failure(pods):
            last = self._api.log(ended.pod, last_lines=_SHOWN_LINES).splitlines()
            message += f"\n{ended.message}; its log ends with:"
        else:
            last = self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []
            message += f"\n{self._log} ends with:" if last else ""
        return "\n".join([message, *(f"  {line}" for line in last[-_SHOWN_LINES:])])


class _PodLines:
    """The lines of a pod's log as it grows, also copied to a file. Each line is returned once, even if read twice."""

    def __init__(self, api: JobsApi, pod: str, copy: Path) -> None:
        self._api, self._pod, self._copy = api, pod, copy
        self._last, self._asked_s = "", 0.0

    def new(self) -> list[str]:
        """The lines since the last call."""
        now_s = time.monotonic()
        lines = self._api.log(self._pod, self._asked_s if self._last else None).split("\n")[:-1]
        self._asked_s = now_s
        if self._last in lines:
            lines = lines[len(lines) - lines[::-1].index(self._last) :]
        self._last = lines[-1] if lines else self._last
        texts = [line.partition(" ")[2] for line in lines]
        with self._copy.open("a") as copy:
            copy.writelines(f"{line}\n" for line in texts)
        return texts


class _FileLines:
    """The lines of a file as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> list[str]:
        """The complete lines since the last call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").split("\n")[:-1]


@contextmanager
def _raise_on_sigterm() -> Iterator[None]:
    """Raise an error when SIGTERM arrives; Kubernetes sends it before it kills a pod."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated("the stage was told to end (SIGTERM); its job is deleted")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _attempt(job: Object) -> int:
    return int(job["metadata"]["name"].rpartition("-")[2])


def _is_unfinished(job: Object) -> bool:
    return state_of(job).phase in ("queued", "active") and "deletionTimestamp" not in job["metadata"]


def _copied(path: Path, target: Path) -> Path:
    """Copy a directory to ``target``, which appears only when it is complete."""
    if not target.exists():
        with written_atomically(target) as partial:
            shutil.copytree(path, partial, copy_function=shutil.copyfile)
    return target


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)

"""The status of a run on a cluster, and following it to its end with a line for each task that changes."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from time import sleep

from moesaic.core.errors import StageError

FINISHED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
"""The final states of Kubeflow."""
POLL_S = 5.0
_LONGEST_WAIT_S = 120.0
_PATIENCE_S = 3600.0
"""The longest that a server may be unavailable before following ends."""


class Unavailable(StageError):
    """The server cannot be reached or fails; the same request may succeed later."""


@dataclass(frozen=True)
class TaskStatus:
    """One task of a run."""

    id: str
    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    message: str
    """Kubeflow's message about a failure; often empty."""

    @property
    def duration_s(self) -> float | None:
        """The duration of a task that has ended; else None."""
        return (self.ended - self.started).total_seconds() if self.started and self.ended else None


@dataclass(frozen=True)
class RunStatus:
    """The status of a run and its tasks."""

    id: str
    name: str
    state: str
    created: datetime
    ended: datetime | None
    message: str
    tasks: tuple[TaskStatus, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in FINISHED

    @property
    def failures(self) -> list[TaskStatus]:
        """The tasks that failed."""
        return [task for task in self.tasks if task.state == "FAILED"]

    def seconds_until(self, moment: datetime | None) -> float:
        """Seconds from the creation of the run to a moment, by the server's clock."""
        return (moment - self.created).total_seconds() if moment else 0.0


def numbered(names: list[str]) -> list[str]:
    """Distinct names of tasks: those of a loop are equal, so from the second on they get ``[1]``, ``[2]``."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        distinct.append(f"{name}[{seen[name]}]" if seen[name] else name)
        seen[name] += 1
    return distinct


def follow(read: Callable[[], RunStatus], show: Callable[[str], None]) -> RunStatus:
    """Read a run until it has finished, waiting while the server is unavailable.

    Raises:
        StageError: if the server stays unavailable; the run itself goes on.
    """
    shown: dict[str, str] = {}
    for run in _polled(read, show):
        for task in run.tasks:
            if task.state != shown.get(task.id):
                shown[task.id] = task.state
                show(_line(run, task))
    return run


def _polled(read: Callable[[], RunStatus], show: Callable[[str], None]) -> Iterator[RunStatus]:
    wait_s, away_s = POLL_S, 0.0
    while True:
        try:
            run = read()
        except Unavailable as lost:
            if away_s >= _PATIENCE_S:
                raise StageError(f"{lost}. It has been away for {away_s / 60:.0f} minutes; the run goes on") from lost
            show(f"{lost}; trying again in {wait_s:.0f} s")
            sleep(wait_s)
            wait_s, away_s = min(2 * wait_s, _LONGEST_WAIT_S), away_s + wait_s
            continue
        yield run
        if run.finished:
            return
        wait_s, away_s = POLL_S, 0.0
        sleep(POLL_S)


def _line(run: RunStatus, task: TaskStatus) -> str:
    elapsed_s = run.seconds_until(task.ended or task.started)
    took = f" after {task.duration_s:.0f} s" if task.state in FINISHED and task.duration_s is not None else ""
    reason = f": {task.message}" if task.message else ""
    return f"[{elapsed_s:5.0f} s] {task.name}: {task.state.lower()}{took}{reason}"

"""The status of a run on a cluster, and following it to its end with a line for each change of a task."""

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
class Change:
    """A change of a task's state."""

    state: str
    moment: datetime
    attempt: int
    """Which attempt it belongs to, from 1."""
    took_s: float | None
    """How long the attempt took, if it has ended."""


@dataclass(frozen=True)
class TaskStatus:
    """One task of a run."""

    id: str
    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    message: str
    """Why it failed, as far as is known."""
    changes: tuple[Change, ...] = ()
    """Of all attempts, in order of time."""
    cached: bool = False
    """Whether Kubeflow took the output of an earlier run."""

    @property
    def duration_s(self) -> float | None:
        """How long its last attempt took; None if it has not ended."""
        return self.changes[-1].took_s if self.changes else None


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
    named_until: datetime | None = None
    """When Kubeflow stopped to say which tasks run; None while it does."""

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


def follow(read: Callable[[], RunStatus], show: Callable[[str], None]) -> RunStatus:
    """Read a run until it has finished, waiting while the server is unavailable.

    Raises:
        StageError: if the server stays unavailable; the run itself goes on.
    """
    shown: Counter[str] = Counter()
    is_told = False
    for run in _polled(read, show):
        new = [(change, task) for task in run.tasks for change in task.changes[shown[task.id] :]]
        if run.named_until and not is_told:
            is_told = True
            show(no_names(run))
        for change, task in sorted(new, key=lambda one: one[0].moment):
            show(_line(run, task, change))
        shown.update({task.id: len(task.changes) - shown[task.id] for task in run.tasks})
    return run


def no_names(run: RunStatus) -> str:
    """A line that says from when on tasks have no names, and where they have."""
    return (
        f"[{run.seconds_until(run.named_until):5.0f} s] Kubeflow's server no longer reads this run's workflow, which "
        "has grown too large for it; what ends from here on has no name. The stages' logs and MLflow have them"
    )


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


def _line(run: RunStatus, task: TaskStatus, change: Change) -> str:
    attempt = f", attempt {change.attempt}" if change.attempt > 1 else ""
    took = f" after {change.took_s:.0f} s" if change.took_s is not None else ""
    how = ", from the cache" if task.cached else f"{took}{attempt}"
    is_last = change is task.changes[-1]
    reason = f": {task.message}" if task.message and is_last else ""
    return f"[{run.seconds_until(change.moment):5.0f} s] {task.name}: {change.state.lower()}{how}{reason}"

"""A run on a cluster: what is known of it, and following it until it ends, a line for each task that changes."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from time import sleep

from moesaic.core.errors import StageError

FINISHED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
"""States of Kubeflow that do not change any more."""
POLL_S = 5.0
_LONGEST_WAIT_S = 120.0
_PATIENCE_S = 3600.0
"""How long a server may be away before it is given up."""


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
    """What Kubeflow says of a failure; it often says nothing."""

    @property
    def duration_s(self) -> float | None:
        """Of a task that has ended."""
        return (self.ended - self.started).total_seconds() if self.started and self.ended else None


@dataclass(frozen=True)
class RunStatus:
    """A run as its server sees it."""

    id: str
    name: str
    state: str
    created: datetime
    ended: datetime | None
    message: str
    tasks: tuple[TaskStatus, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINISHED

    @property
    def failures(self) -> list[TaskStatus]:
        """The tasks that failed."""
        return [task for task in self.tasks if task.state == "FAILED"]

    def seconds_until(self, moment: datetime | None) -> float:
        """Since it was created, by the server's clock."""
        return (moment - self.created).total_seconds() if moment else 0.0


def numbered(names: list[str]) -> list[str]:
    """Tasks' names; those of a loop have the same, and get ``[1]``, ``[2]`` from the second on."""
    seen: Counter[str] = Counter()
    told_apart = []
    for name in names:
        told_apart.append(f"{name}[{seen[name]}]" if seen[name] else name)
        seen[name] += 1
    return told_apart


def follow(read: Callable[[], RunStatus], show: Callable[[str], None]) -> RunStatus:
    """Read a run until it has finished; a server that is away for a while is waited for.

    Raises:
        StageError: if the server stays away; the run itself goes on.
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

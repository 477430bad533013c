"""The tasks of a run, read out of the workflow nodes that Kubeflow's server lists instead of tasks.

Behind a run is an Argo workflow. A task ``X`` of a stage is there as these nodes, beside its ``X-driver``::

    X                      over all attempts
      X(0), X(1), ...      one attempt each
        executor           the container; without pods if the output came from the cache
          executor(0)      a pod

A node names its children by id: the workflow's name and the FNV-1a hash of all names on the way to the child. So tasks
of one name in a loop are told apart by their children. Nodes have a history of states, which a retry continues.

The server (2.17) stops reading a workflow that has grown large. Its nodes stay as they are then, and all that still
arrives are rows without a name: when the containers of tasks began and ended.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import count, takewhile
from typing import Any

from moesaic.platform.cluster.following import Change, TaskStatus

_PODS_TEMPLATE = "system-container-impl"
"""What Kubeflow calls the part of its workflows that runs a container; pods have it in their names."""
_MOST_ITERATIONS = 64
_LONGEST_LAG = timedelta(seconds=60)
"""Nodes follow the containers by 40 s at most, where they follow."""
_UNNAMED = "a task"
_FINAL = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")


def read_leaves(specification: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]] | None:
    """The tasks of a pipeline that run a container, by name, with the loops around them; None if unknown."""
    if not specification:
        return None
    inner = specification.get("pipeline_spec", specification)
    components, leaves = inner.get("components", {}), dict[str, tuple[str, ...]]()

    def read(dag: Mapping[str, Any], loops: tuple[str, ...]) -> None:
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            component = components[task["componentRef"]["name"]]
            if "executorLabel" in component:
                leaves[name] = loops
            else:
                read(component, (*loops, name))

    read(inner["root"], ())
    return leaves


@dataclass(frozen=True)
class Place:
    """A task of a pipeline, and which turn of its loop."""

    name: str
    index: int
    path: str
    """Names of all nodes on the way to it."""

    @property
    def title(self) -> str:
        """What it is called in messages: the first of a loop's has no index."""
        title = self.name.replace("-", "_")
        return f"{title}[{self.index}]" if self.index else title


class WorkflowNodes:
    """The nodes of one run's workflow, and what they say of the tasks."""

    def __init__(self, rows: Collection[Any], leaves: Mapping[str, tuple[str, ...]] | None) -> None:
        """``rows`` are the server's; without ``leaves`` every named row counts as a task."""
        self._rows, self._leaves = [row for row in rows if row.display_name], leaves
        self._bare = [row for row in rows if not row.display_name]
        self._children = {child.pod_name for row in rows for child in row.child_tasks or [] if child.pod_name}
        self._workflow = min(self._children, default="").rpartition("-")[0]

    def tasks(self) -> tuple[TaskStatus, ...]:
        """The tasks of stages and Kubeflow's own that failed before one; after the last name, those without."""
        return (*self._named(), *self._failed_drivers(), *self._unnamed())

    @property
    def named_until(self) -> datetime | None:
        """The last change of a node, if containers have ended long after it; None while nodes are up to date."""
        changes: list[datetime] = [entry.update_time for row in self._rows for entry in row.state_history or []]
        ends = [row.end_time for row in self._bare if _happened(row.end_time)]
        is_late = changes and ends and max(ends) - max(changes) > _LONGEST_LAG
        return max(changes) if is_late else None

    def places(self) -> Iterator[Place]:
        """Everywhere in the pipeline where a task may be; the turns of a loop without end."""
        for name, loops in (self._leaves or {}).items():
            for index in range(_MOST_ITERATIONS if loops else 1):
                turn = f"(0).iteration-iterations({index}:{index})(0).iteration-item(0)"
                way = "".join(f".{loop}{turn}" for loop in loops)
                yield Place(name, index, f"{self._workflow}(0).root{'' if way else '(0)'}{way and '(0)' + way}.{name}")

    def pods(self, place: Place, attempt: int = 0) -> list[str]:
        """Names of the pods that ran a task's container in one attempt, the last one first."""
        executor = f"{place.path}({attempt}).executor"
        last = self._last(executor)
        return [f"{self._workflow}-{_PODS_TEMPLATE}-{_hash(f'{executor}({n})')}" for n in range(last, -1, -1)]

    def last_attempt(self, place: Place) -> int:
        """Number of the last attempt that has a node, from 0."""
        return self._last(place.path)

    def place_of(self, task: TaskStatus) -> Place | None:
        """Where in the pipeline a task is."""
        return next((place for place in self.places() if place.title == task.name), None)

    def _named(self) -> Iterator[TaskStatus]:
        if self._leaves is None:
            for index, row in enumerate(self._rows):
                yield _task(row, [row], Place(row.display_name, 0, f"{index}"), cached=False)
            return
        for name in self._leaves:
            rows = [row for row in self._rows if row.display_name == name and row.state]
            places = [place for place in self.places() if place.name == name]
            for row, place in _matched(rows, places, self._workflow):
                attempts = self._attempts(place, alone=len(rows) == 1)
                cached = row.state == "SUCCEEDED" and bool(attempts) and not self._has_pod(place)
                yield _task(row, attempts or [row], place, cached)

    def _attempts(self, place: Place, *, alone: bool) -> list[Any]:
        """The rows of a task's attempts, in order; in a loop, those whose children say that they are its own."""
        found = []
        for number in range(self.last_attempt(place) + 1):
            ids = {node_id(self._workflow, f"{place.path}({number}).executor")}
            rows = [row for row in self._rows if row.display_name == f"{place.name}({number})"]
            found += [row for row in rows if alone or ids & {child.pod_name for child in row.child_tasks or []}]
        return found

    def _last(self, path: str) -> int:
        """The last number that a node of this path has; 0 if it has none."""
        ids = (node_id(self._workflow, f"{path}({number})") for number in count(1))
        return sum(1 for _ in takewhile(self._children.__contains__, ids))

    def _has_pod(self, place: Place) -> bool:
        attempts = range(self.last_attempt(place) + 1)
        return any(
            node_id(self._workflow, f"{place.path}({number}).executor(0)") in self._children for number in attempts
        )

    def _failed_drivers(self) -> Iterator[TaskStatus]:
        for row in self._rows:
            if row.state == "FAILED" and row.display_name.endswith("-driver") and self._leaves is not None:
                yield _task(row, [row], Place(row.display_name, 0, row.task_id), cached=False)

    def _unnamed(self) -> Iterator[TaskStatus]:
        if (since := self.named_until) is None:
            return
        for row in self._bare:
            if _happened(row.end_time) and row.end_time > since:
                took_s = (row.end_time - row.start_time).total_seconds()
                change = Change("ENDED", row.end_time, 1, took_s)
                yield TaskStatus(row.task_id, _UNNAMED, "ENDED", row.start_time, row.end_time, "", (change,))


def node_id(workflow: str, path: str) -> str:
    """The id of a workflow's node, as Argo makes it."""
    return f"{workflow}-{_hash(path)}"


@lru_cache(maxsize=2**16)
def _hash(path: str) -> int:
    """FNV-1a, 32 bits."""
    value = 0x811C9DC5
    for byte in path.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def _matched(rows: Sequence[Any], places: Sequence[Place], workflow: str) -> Iterator[tuple[Any, Place]]:
    """Each row with its place: that whose first attempt is among its children, else the first that is left."""
    ids = {node_id(workflow, f"{place.path}(0)"): place for place in places}
    left, unmatched = list(places), []
    for row in sorted(rows, key=lambda row: (row.start_time, row.task_id)):
        place = next((ids[one.pod_name] for one in row.child_tasks or [] if one.pod_name in ids), None)
        if place in left:
            left.remove(place)
            yield row, place
        else:
            unmatched.append(row)
    yield from zip(unmatched, left, strict=False)


def _task(row: Any, attempts: Sequence[Any], place: Place, cached: bool) -> TaskStatus:
    changes = _changes(attempts)
    return TaskStatus(
        id=f"{place.path} {row.task_id}",
        name=place.title,
        state=row.state or "PENDING",
        started=_happened(row.start_time),
        ended=_happened(row.end_time),
        message=read_message(row.error),
        changes=changes,
        cached=cached,
    )


def _changes(attempts: Sequence[Any]) -> tuple[Change, ...]:
    """The history of a task over its attempts, in order of time; a state that repeats itself is no change."""
    entries = sorted((moment, state) for row in attempts for state, moment in _history(row))
    changes: list[Change] = []
    begun, attempt = None, 0
    for moment, state in entries:
        if changes and changes[-1].state == state:
            continue
        if state == "RUNNING":
            begun, attempt = moment, attempt + 1
        took_s = (moment - begun).total_seconds() if begun and state in _FINAL else None
        changes.append(Change(state, moment, max(attempt, 1), took_s))
    return tuple(changes)


def _history(row: Any) -> list[tuple[str, datetime]]:
    """States with the times at which they began; the server notes them some seconds late, but for the ends of a row."""
    entries = [(entry.state, entry.update_time) for entry in row.state_history or [] if entry.state]
    if not entries and row.state:
        entries = [(row.state, row.end_time if row.state in _FINAL else row.start_time)]
    if entries and _happened(row.start_time) and row.start_time < entries[0][1]:
        entries[0] = (entries[0][0], row.start_time)
    if len(entries) > 1 and entries[-1][0] in _FINAL and _happened(row.end_time):
        entries[-1] = (entries[-1][0], max(row.end_time, entries[-2][1]))
    return entries


def _happened(moment: datetime | None) -> datetime | None:
    """The time, or None: Kubeflow writes 1970 or the year 1 for what has not happened yet."""
    return moment if moment and moment.year > 1970 else None


def read_message(error: Any) -> str:
    """The message of an error, on one line."""
    text = error.message if error and error.message else ""
    return " ".join(text.split())[:400]

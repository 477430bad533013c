"""The nodes of a run's workflow as Kubeflow's server lists them, for the stub of its API; and recordings of a real one.

The recordings in ``recordings/`` are what the API server of Kubeflow Pipelines 2.17 answered while it ran pipelines of
Moesaic: each line a run, with the rows of ``task_details`` that have changed since the line before.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from kfp_server_api import models

RECORDINGS = Path(__file__).with_name("recordings")
NAME = "search-x2x4b"
YEAR_ONE = datetime.fromisoformat("0001-01-01T00:00:00Z")
FINAL = ("SUCCEEDED", "FAILED", "SKIPPED")


def recorded(name: str) -> Iterator[dict[str, Any]]:
    """The answers of a recording, whole, one after the other."""
    rows: dict[str, Any] = {}
    specification: Any = None
    with gzip.open(RECORDINGS / f"{name}.jsonl.gz", "rt") as lines:
        for line in lines:
            run = json.loads(line)
            specification = run.pop("pipeline_spec", specification)
            rows |= {row["task_id"]: row for row in run.pop("changed_tasks")}
            yield run | {"run_details": {"task_details": list(rows.values())}, "pipeline_spec": specification}


def fnv1a(text: str) -> int:
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return value


class Workflow:
    """The nodes of one run."""

    def __init__(self, start: datetime, loops: Mapping[str, str]) -> None:
        """``loops`` has the loop of each task that is in one."""
        self._start, self._loops = start, loops
        self._rows: dict[str, Any] = {}

    def update(self, seconds: float, tasks: Mapping[str, str | tuple[str, str]]) -> list[Any]:
        """Set states of tasks: ``reinforce#1`` is the second of a loop; what is ``CACHED`` succeeds without a pod."""
        for name, given in tasks.items():
            state, message = (given, "") if isinstance(given, str) else given
            if name.endswith("-driver"):
                self._set(f"{NAME}(0).root(0).{name}", name, state, seconds, [], message)
                continue
            self._set_task(name, state, seconds, message)
        return sorted(self._rows.values(), key=lambda row: fnv1a(row.task_id))

    def path(self, name: str) -> str:
        title, _, index = name.partition("#")
        turn = f"{index or 0}:{index or 0}"
        loop = self._loops.get(title)
        way = f"{loop}(0).iteration-iterations({turn})(0).iteration-item(0)." if loop else ""
        return f"{NAME}(0).root(0).{way}{title}"

    def pod(self, name: str) -> str:
        """The pod of a task's first attempt."""
        return f"{NAME}-system-container-impl-{fnv1a(f'{self.path(name)}(0).executor(0)')}"

    def _set_task(self, name: str, state: str, seconds: float, message: str) -> None:
        path, title = self.path(name), name.partition("#")[0]
        attempt, executor = f"{path}(0)", f"{path}(0).executor"
        is_cached, state = state == "CACHED", "SUCCEEDED" if state == "CACHED" else state
        self._set(f"{path}-driver", f"{title}-driver", "SUCCEEDED", seconds, [])
        self._set(path, title, state, seconds, [attempt], message)
        self._set(attempt, f"{title}(0)", state, seconds, [executor])
        self._set(
            executor, "executor", "SKIPPED" if is_cached else state, seconds, [] if is_cached else [f"{executor}(0)"]
        )
        if not is_cached:
            self._set(f"{executor}(0)", "executor(0)", state, seconds, [])

    def _set(self, path: str, name: str, state: str, seconds: float, children: list[str], message: str = "") -> None:
        now = self._start + timedelta(seconds=seconds)
        row = self._rows.get(path)
        if row is None:
            row = models.V2beta1PipelineTaskDetail(
                task_id=str(fnv1a(path)),
                display_name=name,
                create_time=self._start,
                start_time=now,
                state_history=[],
                child_tasks=[
                    models.PipelineTaskDetailChildTask(pod_name=f"{NAME}-{fnv1a(child)}") for child in children
                ],
            )
            self._rows[path] = row
        if row.state != state:
            assert state in models.V2beta1RuntimeState.allowable_values
            row.state = state
            row.state_history.append(models.V2beta1RuntimeStatus(update_time=now, state=state))
            row.end_time = now if state in FINAL else YEAR_ONE
        row.error = models.GoogleRpcStatus(code=2, message=message) if message else None

"""Runs the tasks of a local run side by side: each as soon as what it takes has been made, as on a cluster.

Kubeflow's local runner goes through a graph task by task; only the iterations of a loop run two at a time. Here a graph
is gone through by its dependencies, and as many tasks run at once as there are cores. A task that times what it runs
waits until it can run alone. Of those that wait, the one with the longest chain of tasks behind it is the first to run:
what nobody waits for fills the gaps.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import cache, partial
from threading import Condition
from typing import Any
from unittest.mock import patch

from moesaic.stages import find_stage

_STAGE_OPTION = "--function_to_execute"
"""The argument of Kubeflow's executor before the name of the component's function, which is its stage's."""
Start = Callable[[Sequence[str], Mapping[str, str] | None], int]
Urgency = tuple[int, ...]
_TOGETHER_S = 0.1
"""Tasks that become ready at once arrive within this time, one after the other; the most urgent may be the last."""
_urgency: ContextVar[Urgency] = ContextVar("_urgency", default=())
"""Of the task that is being run: how many tasks its graph still has from it to the end, behind that of the graph."""


class Cores:
    """Lets tasks in while cores are free: each takes one, or all if it must be alone.

    Args:
        count: of cores.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: list[Urgency] = []
        self._changed = Condition()
        self._closed = False

    @contextmanager
    def take(self, alone: bool, urgency: Urgency = ()) -> Iterator[bool]:
        """Wait for cores, and for all that is more urgent, and hold them; gives whether there is still a run."""
        number = self._count if alone else 1
        with self._changed:
            self._waiting.append(urgency)
        time.sleep(_TOGETHER_S)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._free >= number and urgency == max(self._waiting)))
            self._waiting.remove(urgency)
            self._free -= number
            is_open = not self._closed
            self._changed.notify_all()
        try:
            yield is_open
        finally:
            with self._changed:
                self._free += number
                self._changed.notify_all()

    def close(self) -> None:
        """Let no further task in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextmanager
    def ended_on_interrupt(self) -> Iterator[None]:
        """Inside, whatever is raised ends the tasks that run and lets no further one in."""
        try:
            yield
        except BaseException:
            self.close()
            for task in multiprocessing.active_children():
                task.terminate()
            raise


@contextmanager
def tasks_side_by_side(count: int | None = None) -> Iterator[None]:
    """Let Kubeflow's local runner run tasks at once, on so many cores, or on all that this process may use.

    The runner's own context managers for logs swap handlers and ``print`` for the whole process and put back what they
    found, which threads would do in each other's way. So they do nothing here: what they show goes to the log anyway.
    """
    from kfp.local import logging_utils
    from kfp.local import subprocess_task_handler as runner
    from kfp.local.orchestrator import dag_orchestrator, enhanced_dag_orchestrator

    cores = Cores(count or len(os.sched_getaffinity(0)))
    graph = partial(_run_graph, cores)
    with (
        patch.object(runner, "run_local_subprocess", partial(_run_task, cores, runner.run_local_subprocess)),
        patch.object(dag_orchestrator, "run_dag", graph),
        patch.object(enhanced_dag_orchestrator, "run_enhanced_dag", graph),
        patch.object(logging_utils, "local_logger_context", nullcontext),
        patch.object(logging_utils, "indented_print", nullcontext),
    ):
        yield


def _run_task(
    cores: Cores, start: Start, full_command: Sequence[str], env_vars: Mapping[str, str] | None = None
) -> int:
    """Run a task when its turn comes; returns its exit status."""
    stage = find_stage(full_command[full_command.index(_STAGE_OPTION) + 1])
    with cores.take(stage.alone, _urgency.get()) as is_open:
        return start(full_command, env_vars) if is_open else 1


def _run_graph(
    cores: Cores,
    *,
    dag_component_spec: Any,
    dag_arguments: dict[str, Any],
    fail_stack: list[str],
    parent_io_store: Any = None,
    **given: Any,
) -> tuple[dict[str, Any], Any]:
    """Run one graph of the pipeline, with the arguments and results of Kubeflow's own function.

    After a failure nothing new is begun, and what runs is finished: it is kept for the next run.
    """
    from kfp.local import io, status
    from kfp.local.orchestrator.orchestrator_utils import OrchestratorUtils as Utils

    store = io.IOStore(parent=parent_io_store)
    for name, value in Utils.join_user_inputs_and_defaults(dag_arguments, dag_component_spec.input_definitions).items():
        store.put_parent_input(name, value)
    tasks = dict(dag_component_spec.dag.tasks)
    waiting = {name: set(task.dependent_tasks) for name, task in tasks.items()}
    urgencies = _urgencies(waiting)
    running: dict[Future[bool], str] = {}
    with ThreadPoolExecutor(max_workers=len(tasks)) as pool, cores.ended_on_interrupt():
        while waiting or running:
            for name in [name for name, needed in waiting.items() if not needed]:
                del waiting[name]
                given_to_task = given | {"io_store": store, "fail_stack": fail_stack}
                running[pool.submit(_succeeds, name, tasks[name], urgencies[name], given_to_task)] = name
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                if not future.result():
                    cores.close()
                    waiting.clear()
                    fail_stack.append(name)
                for needed in waiting.values():
                    needed.discard(name)
    if fail_stack:
        return {}, status.Status.FAILURE
    return Utils.get_dag_outputs(dag_component_spec.dag.outputs, store), status.Status.SUCCESS


def _urgencies(needed: Mapping[str, Collection[str]]) -> dict[str, Urgency]:
    """The urgency of every task of a graph, given the tasks that each one needs."""

    @cache
    def height(name: str) -> int:
        return 1 + max((height(other) for other, needs in needed.items() if name in needs), default=0)

    return {name: (*_urgency.get(), height(name)) for name in needed}


def _succeeds(name: str, task: Any, urgency: Urgency, given: dict[str, Any]) -> bool:
    """Run a task, a graph of tasks or a loop, and keep its outputs in the graph's store; says whether it succeeded."""
    from kfp.local import status
    from kfp.local.orchestrator import enhanced_dag_orchestrator as kubeflow

    _urgency.set(urgency)
    if task.WhichOneof("iterator"):
        return not kubeflow._run_parallel_for_task(task_name=name, task_spec=task, parallel_executor=_Loop(), **given)
    outputs, outcome = kubeflow.execute_task(task_name=name, task_spec=task, **given)
    for key, output in outputs.items():
        given["io_store"].put_task_output(name, key, output)
    return bool(outcome == status.Status.SUCCESS)


class _Loop:
    """Runs the iterations of a loop, each as urgent as the loop; in place of Kubeflow's, which runs two at a time."""

    def execute_parallel_tasks(
        self, tasks: Sequence[tuple[str, Any]], parallelism_limit: int, **given: Any
    ) -> tuple[dict[str, Any], Any]:
        """The outputs by iteration, and whether all succeeded, as of Kubeflow's own method."""
        from kfp.local import status
        from kfp.local.orchestrator import enhanced_dag_orchestrator as kubeflow

        with ThreadPoolExecutor(parallelism_limit or len(tasks)) as pool:
            running = {
                name: pool.submit(
                    copy_context().run, partial(kubeflow.execute_task, task_name=name, task_spec=task, **given)
                )
                for name, task in tasks
            }
        ended = {name: future.result() for name, future in running.items()}
        failed = [name for name, (_, outcome) in ended.items() if outcome != status.Status.SUCCESS]
        given["fail_stack"].extend(failed)
        if failed:
            return {}, status.Status.FAILURE
        for name, (outputs, _) in ended.items():
            for key, output in outputs.items():
                given["io_store"].put_task_output(name, key, output)
        return {name: outputs for name, (outputs, _) in ended.items()}, status.Status.SUCCESS

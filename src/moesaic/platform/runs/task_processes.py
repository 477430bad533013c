"""Where the tasks of a local run come from: forks of one process that has imported what all of them need.

Kubeflow's local runner starts a new Python for each task, which takes seconds to import Kubeflow, PyTorch and
transformers; a run has dozens of tasks. Here a task is a fork of a process that has done so (the ``forkserver`` of
``multiprocessing``), in the state of a new one: one thread, and nothing computed. What it then executes is what the
runner would have started: Kubeflow's executor on the component's code.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from moesaic.models.families import FAMILIES

_IMPORTED = (
    "__main__",
    "kfp.dsl.executor_main",
    "mlflow",
    "moesaic.models.loading",
    "moesaic.platform.runs.runtime",
    *(
        f"transformers.models.{kind}.modeling_{kind}"
        for kind in sorted({each.parent_type for each in FAMILIES.values()})
    ),
)
"""Modules that tasks find imported; importing them computes nothing and starts no thread."""
_RUNTIME = "_KFP_RUNTIME"
"""The variable by which a component's code knows that it runs as a task."""


@contextmanager
def forked_tasks() -> Iterator[None]:
    """Let Kubeflow's local runner start its tasks as forks; where forks are not safe (macOS) it starts new Pythons."""
    from kfp.local import subprocess_task_handler as runner

    if sys.platform != "linux":
        yield
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    start, runner.run_local_subprocess = runner.run_local_subprocess, _run_task
    try:
        yield
    finally:
        runner.run_local_subprocess = start


def _run_task(full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
    """Run a task and print what it writes, line by line.

    Args:
        full_command: a shell, its options, the script that starts Kubeflow's executor, the component's code, and the
            executor's arguments.
        env_vars: variables besides those of this process.

    Returns:
        The task's exit status.
    """
    code, arguments = full_command[3], list(full_command[4:])
    variables = {**os.environ, **(env_vars or {}), _RUNTIME: "true"}
    context = multiprocessing.get_context("forkserver")
    lines, written = context.Pipe(duplex=False)
    task = context.Process(target=_execute, args=(code, arguments, variables, os.getcwd(), written))
    task.start()
    written.close()
    with os.fdopen(os.dup(lines.fileno()), errors="replace") as output:
        lines.close()
        for line in output:
            print(line, end="")
    task.join()
    print("\n")
    status = task.exitcode or 0
    task.close()
    return status


def _execute(
    code: str, arguments: Sequence[str], variables: Mapping[str, str], directory: str, output: Connection
) -> None:
    """The task itself, in its own process."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # they are files
    from kfp.dsl.executor_main import executor_main

    with tempfile.TemporaryDirectory() as place:
        component = Path(place) / "ephemeral_component.py"
        component.write_text(code)
        sys.argv = ["executor_main", "--component_module_path", str(component), *arguments]
        executor_main()

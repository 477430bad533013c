"""Run a compiled pipeline on this machine, through Kubeflow's own local runner and with its cache kept.

The runner's output goes to ``kubeflow.log``; the lines of the stages are shown to the user.
"""

import contextlib
import io
import json
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from moesaic.core.errors import ConfigError, MoesaicError, StageError
from moesaic.core.redaction import redact
from moesaic.core.yaml_text import read_yaml
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.runs.runtime import FAILURE
from moesaic.platform.runs.side_by_side import tasks_side_by_side
from moesaic.platform.runs.task_processes import forked_tasks

LOG = "kubeflow.log"
_INPUT_BEGINS, _INPUT_ENDS = "Got executor_input:", "}"
"""The runner prints every task's input as JSON between these lines."""
_RUNNER_LINE = re.compile(r"\s*(\[KFP Executor|\d\d:\d\d:\d\d\.\d{3} - |-{20,}|\x1b\[)")
_CACHE_HIT = re.compile(r"Task (\S+) cache hit")


def parameters_of(manifest: Path) -> list[str]:
    """The names of a compiled pipeline's parameters."""
    specification = read_yaml(manifest)
    return list(specification["root"]["inputDefinitions"]["parameters"])


def run_compiled(
    manifest: Path, arguments: Mapping[str, Any], context: RunContext, console: Console, at_once: int | None = None
) -> dict[str, Path]:
    """Run the pipeline; finished tasks of earlier runs in the same directory are reused.

    Args:
        manifest: the compiled pipeline.
        arguments: its parameters.
        context: of a local run.
        console: shows the stages' own lines.
        at_once: tasks that run at once, at most; as many as there are cores if it is not given.

    Returns:
        The directory of each of the pipeline's output artifacts.

    Raises:
        MoesaicError: with the message and the exit code of the stage that failed.
    """
    from kfp import components, local

    assert context.run_directory is not None, "a local run has a directory"
    directory = context.run_directory
    (directory / FAILURE).unlink(missing_ok=True)
    warnings.filterwarnings("ignore", module="kfp")
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(directory / "tasks"),
        enable_caching=True,
        cache_root=str(directory / "cache"),
    )
    pipeline = components.load_component_from_file(str(manifest))
    with _task_variables(context), _shown_stages(directory / LOG, console), forked_tasks(), tasks_side_by_side(at_once):
        try:
            finished = pipeline(**arguments)
        except RuntimeError as failure:
            raise _explain(directory) from failure
    return {name: Path(artifact.path) for name, artifact in finished.outputs.items()}


def _explain(directory: Path) -> MoesaicError:
    """The error that the failed stage wrote into the run's directory."""
    try:
        failure = json.loads((directory / FAILURE).read_text())
    except FileNotFoundError:
        return StageError(f"a task was lost without a word; read {directory / LOG}")
    error = ConfigError if failure["exit_code"] == ConfigError.exit_code else StageError
    return error(f"{failure['stage']}: {failure['message']}\nThe whole log is in {directory / LOG}")


@contextlib.contextmanager
def _task_variables(context: RunContext) -> Iterator[None]:
    """Set the tasks' environment variables. Each task gets one thread: more slow small models on a CPU down."""
    before = dict(os.environ)
    os.environ.update(
        {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        | before
        | context.as_environment()
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _shown_stages(log: Path, console: Console) -> Iterator[None]:
    root = logging.getLogger()
    with log.open("a") as file:
        lines = _StageLines(file, console)
        handlers, level = (_CacheHits(lines), _runner_lines(lines)), root.level
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(lines):
                yield
        finally:
            for handler in handlers:
                root.removeHandler(handler)
            root.setLevel(level)


def _runner_lines(lines: io.TextIOBase) -> logging.Handler:
    """Writes what the runner logs, as the runner itself does."""
    from kfp.local.logging_utils import MillisecondFormatter

    handler = logging.StreamHandler(lines)
    handler.setFormatter(MillisecondFormatter("%(asctime)s - %(levelname)s - %(message)s", "%H:%M:%S.%f"))
    return handler


class _StageLines(io.TextIOBase):
    """Receives the runner's output: logs it without secrets, and shows the stages' own lines with the time."""

    def __init__(self, log: TextIO, console: Console) -> None:
        self._log, self._console = log, console
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._task = threading.local()

    def write(self, text: str) -> int:
        with self._lock:
            shown = redact(text, os.environ)
            self._log.write(shown)
            self._log.flush()
            if not self._is_from_runner(shown):
                for line in filter(str.strip, shown.splitlines()):
                    self.show(line)
        return len(text)

    def _is_from_runner(self, text: str) -> bool:
        """Each task writes from a thread of its own."""
        if getattr(self._task, "inside_input", False):
            self._task.inside_input = text.rstrip("\n") != _INPUT_ENDS
            return True
        self._task.inside_input = _INPUT_BEGINS in text
        return _RUNNER_LINE.match(text) is not None

    def show(self, line: str) -> None:
        elapsed = time.monotonic() - self._start
        self._console.print(f"[{elapsed:5.0f} s] {line.strip()}", markup=False, highlight=False, soft_wrap=True)


class _CacheHits(logging.Handler):
    """Shows which tasks the runner takes from its cache."""

    def __init__(self, lines: _StageLines) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if hit := _CACHE_HIT.match(record.getMessage()):
            self._lines.show(f"{hit[1].replace('-', '_')}: kept from an earlier run")

"""Start AutoModel's own command line, here or as a job, show its progress, and take it down whole."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

import psutil
import yaml

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.nodes import Nodes, Work
from moesaic.core.progress import say
from moesaic.recover.distill.automodel.messages import PREFIX
from moesaic.recover.distill.automodel.settings import Job, render
from moesaic.recover.distill.stage import DistillConfig

_SHOWN_LINES = 20
_ENVIRONMENT = {
    "NEMO_ENABLE_USER_MODULES": "1",  # lets its YAML name classes of ours
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "PYTHONUNBUFFERED": "1",
}


def check_installed() -> None:
    """Raise ConfigError unless AutoModel is there; it is not imported."""
    if find_spec("nemo_automodel") is None:
        raise ConfigError("distill trains with nemo-automodel, which is not installed; install moesaic[train]")


def train(config: DistillConfig, job: Job, nodes: Nodes | None = None) -> None:
    """Run a distillation to its end, from where an earlier call with the same scratch directory came to.

    Args:
        config: what to train.
        job: its files and devices.
        nodes: where its processes run; None: beside this one.

    An engine whose processes fail at their exit, after the trained tensors are written, has done its work.

    Raises:
        StageError: if the engine fails, saying why; it goes on from its last checkpoint when called again.
    """
    try:
        if nodes:
            _train_on(nodes, config, job)
        else:
            _train_here(config, job)
    except StageError as failure:
        if not job.trained.is_file():
            raise
        say(f"{PREFIX}the tensors are trained, but the engine failed when it ended:\n{failure}")


def command(job: Job, rendezvous: Sequence[str]) -> list[str]:
    """What every node runs; ``rendezvous`` says how the processes find each other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    processes = ["--nproc-per-node", str(job.num_processes // job.num_nodes)]
    return [*launcher, *processes, "-m", "nemo_automodel.cli.app", str(job.settings)]


def _prepare(config: DistillConfig, job: Job) -> None:
    job.settings.write_text(yaml.safe_dump(render(config, job), sort_keys=False))
    job.failure.unlink(missing_ok=True)


def _train_on(nodes: Nodes, config: DistillConfig, job: Job) -> None:
    """As a TrainJob; Kubeflow Trainer sets torchrun's variables of the node's rank and of where the first node is."""
    run_id = {name: value for name, value in os.environ.items() if name == "MLFLOW_RUN_ID"}
    work = Work(command(job, ["--nnodes", str(job.num_nodes)]), _ENVIRONMENT | run_id, job.log)
    try:
        nodes.run(work, prepare=lambda: _prepare(config, job), show=_show)
    except StageError as failure:
        if not job.failure.is_file():
            raise
        raise StageError(f"{job.failure.read_text()}\n{failure}") from failure
    if not job.trained.is_file():
        raise StageError(f"the job ended without {job.trained}; its output is in {job.log}")


def _train_here(config: DistillConfig, job: Job) -> None:
    _prepare(config, job)
    engine = subprocess.Popen(
        command(job, ["--standalone"]),
        env={**os.environ, **_ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        last_lines = _follow(engine, job)
        status = engine.wait()
    finally:
        _take_down(engine)
    if status or not job.trained.is_file():
        raise StageError(_explain(status, last_lines, job))


def _follow(engine: "subprocess.Popen[str]", job: Job) -> deque[str]:
    """Write all output to the log, pass progress on to standard error, and return the last lines."""
    last: deque[str] = deque(maxlen=_SHOWN_LINES)
    assert engine.stdout is not None
    with job.log.open("a") as log:
        for line in engine.stdout:
            log.write(line)
            log.flush()
            last.append(line)
            _show(line.removesuffix("\n"))
    return last


def _show(line: str) -> None:
    """Pass progress on to standard error."""
    if PREFIX in line:
        say(line[line.index(PREFIX) :])


def _take_down(engine: "subprocess.Popen[str]") -> None:
    """Kill whatever is left of the engine; its workers lead sessions of their own, so a group is not enough."""
    if engine.poll() is None:
        launcher = psutil.Process(engine.pid)
        for process in (*launcher.children(recursive=True), launcher):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    engine.wait()
    if engine.stdout is not None:
        engine.stdout.close()


def _explain(status: int, last_lines: deque[str], job: Job) -> str:
    if job.failure.is_file():
        return job.failure.read_text()
    shown = "".join(f"  {line}" for line in last_lines)
    return f"AutoModel ended with status {status} before the last step; its output ends with:\n{shown}"

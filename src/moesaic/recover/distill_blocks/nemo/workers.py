"""The worker processes: each trains its share of the blocks one after another, and ends with the process above it."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from moesaic.core.child_processes import last_lines
from moesaic.core.errors import ConfigError, StageError
from moesaic.recover.distill_blocks.nemo.jobs import BlockJob

_POLL_S = 0.2


def check_installed() -> None:
    """Raise ConfigError unless NeMo is there."""
    if find_spec("nemo") is None:
        raise ConfigError("distill_blocks trains with nemo_toolkit, which is not installed; install moesaic[nemo]")


def train_blocks(jobs: Sequence[BlockJob], num_workers: int, logs: Path) -> None:
    """Train every block that is not finished yet, in up to ``num_workers`` processes.

    Raises:
        StageError: if a worker fails; the others are stopped, and a later call goes on from their checkpoints.
    """
    open_jobs = [job for job in jobs if not job.is_finished]
    shares = [open_jobs[first::num_workers] for first in range(min(num_workers, len(open_jobs)))]
    with ExitStack() as stack:
        running = []
        for worker, share in enumerate(shares):
            log = logs / f"worker-{worker}.log"
            process = _start(share, log, worker_environment(dict(os.environ), worker, len(shares)))
            stack.callback(_stop, process)
            running.append((process, log))
        while running:
            time.sleep(_POLL_S)
            for process, log in running:
                if process.poll():
                    raise StageError(f"training blocks failed with status {process.returncode}; {last_lines(log)}")
            running = [(process, log) for process, log in running if process.poll() is None]


def worker_environment(environment: dict[str, str], worker: int, num_workers: int) -> dict[str, str]:
    """A worker's own GPU where there are several, and its share of the CPU's cores."""
    cores = max(1, (os.cpu_count() or 1) // num_workers)
    chosen = {"OMP_NUM_THREADS": str(cores), **environment}
    visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    devices = [device for device in visible.split(",") if device]
    return chosen | ({"CUDA_VISIBLE_DEVICES": devices[worker % len(devices)]} if devices else {})


def _start(share: Sequence[BlockJob], log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a worker: jobs go in by standard input, progress comes out, all else that it prints is logged."""
    command = [sys.executable, "-m", "moesaic.recover.distill_blocks.nemo", str(os.getpid())]
    with log.open("ab") as target:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, stderr=target, env=environment)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # one that has already failed says why in its log
        process.stdin.write("".join(job.to_json() + "\n" for job in share).encode())
    return process


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()

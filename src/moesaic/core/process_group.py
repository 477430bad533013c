"""Several processes, one per GPU, share the batches of a stage; torchrun starts them on this machine.

A stage that can be shared has a function ``work``, which takes its inputs and a ``batch_share``. Process r of n takes
every n-th batch, starting at batch r. The results are gathered and put back into the order of the batches, so that sums
over them are the same for any n.

Run by torchrun: python -m moesaic.core.process_group JOB
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moesaic.core.child_processes import end_with
from moesaic.core.config import Config
from moesaic.core.errors import ConfigError, MoesaicError, StageError
from moesaic.core.stage import Stage

Item = TypeVar("Item")
NUM_PROCESSES = "MOESAIC_NUM_PROCESSES"
"""The environment variable that says how many processes work where there is no GPU; on GPUs there is one for each."""


@dataclass(frozen=True)
class BatchShare:
    """The batches of one process: every ``count``-th one, starting at ``rank``."""

    rank: int = 0
    count: int = 1

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """Select this process's items."""
        return list(items[self.rank :: self.count])

    def gather(self, parts: Sequence[Item]) -> list[Item]:
        """Return the results of all processes, in the order of the batches, to every process."""
        if self.count == 1:
            return list(parts)
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, list(parts))
        merged: list[Any] = [None] * sum(map(len, everyone))
        for rank, own in enumerate(everyone):
            merged[rank :: self.count] = own
        return merged


def num_processes() -> int:
    """The number of processes to use on this machine."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    text = os.environ.get(NUM_PROCESSES, "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{NUM_PROCESSES} is {text!r}; set it to a number of processes, 1 or more, or leave it unset")
    return int(text)


def share(config: Config, inputs: Mapping[str, Path], scratch: Path, num_batches: int) -> bool:
    """Run ``work`` of the config's stage in several processes.

    Returns:
        False, without having run anything, if there is only one process to use.

    Raises:
        StageError: if one of them fails, saying why.
    """
    count = min(num_processes(), num_batches)
    if count == 1:
        return False
    job, failures = scratch / "job.json", scratch.glob("failure-*.txt")
    for stale in failures:
        stale.unlink()
    paths = {name: str(path.absolute()) for name, path in inputs.items()}
    content = {
        "stage": type(config).__module__,
        "config": config.to_json(),
        "inputs": paths,
        "launcher_pid": os.getpid(),
    }
    job.write_text(json.dumps(content) + "\n")
    _run(["--standalone", "--nproc-per-node", str(count), "-m", __name__, str(job.absolute())], count, scratch)
    return True


def _run(arguments: list[str], count: int, scratch: Path) -> None:
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=sys.stderr,
    )
    try:
        status = launched.wait()
    finally:
        if launched.poll() is None:
            launched.terminate()
            launched.wait()
    if status:
        reasons = [path.read_text() for path in sorted(scratch.glob("failure-*.txt"))]
        raise StageError(reasons[0] if reasons else f"one of {count} processes failed with status {status}; see above")


def main(job: Path) -> None:
    """Run ``work`` as one of the processes."""
    content = json.loads(job.read_text())
    end_with(content["launcher_pid"])
    batch_share = BatchShare(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    stage: Stage = import_module(content["stage"]).STAGE
    dist.init_process_group("gloo")
    try:
        work = import_module(f"{stage.room}.run").work
        inputs = {name: Path(path) for name, path in content["inputs"].items()}
        work(stage.config.parse(content["config"]), **inputs, scratch=job.parent, batch_share=batch_share)
    except MoesaicError as failure:
        (job.parent / f"failure-{batch_share.rank}.txt").write_text(str(failure))
        raise SystemExit(failure.exit_code) from failure
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""AutoModel without starting Python: its processes are forks of this one, which imports it once for all tests."""

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from multiprocessing import get_context
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch

from moesaic.recover.distill.automodel import launch


def fork_engine(patch: pytest.MonkeyPatch) -> None:
    """Let ``distill`` train in forks while the patch lasts."""
    forks = SimpleNamespace(Popen=ForkedEngine, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    patch.setattr(launch, "subprocess", forks)


class ForkedEngine:
    """In the place of ``subprocess.Popen`` of torchrun with one process: what that process would run, in a fork."""

    def __init__(self, command: list[str], env: Mapping[str, str], **_: Any) -> None:
        assert command[command.index("--nproc-per-node") + 1] == "1"
        import_engine()
        lines, written = os.pipe()
        arguments = command[command.index("nemo_automodel.cli.app") :]
        self._process = get_context("fork").Process(target=_run, args=(arguments, dict(env), written))
        self._process.start()
        os.close(written)
        self.stdout: IO[str] = os.fdopen(lines, errors="replace")
        self.pid = self._process.pid

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode


def import_engine() -> None:
    """Import what takes seconds, and compile nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import moesaic.recover.distill.automodel.recipe  # noqa: F401


def _run(arguments: list[str], env: dict[str, str], written: int) -> None:
    """The process: torchrun's variables, its output to the pipe, and AutoModel's command line."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(env | ranks)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(written, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork has none of this process's other threads
    from nemo_automodel.cli.app import main

    sys.argv = arguments
    main()

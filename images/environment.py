"""Make the environment that the Makefile's commands run in: exact pins, and no more than this machine can use.

Runs under any bare Python that is supported. On a machine without an NVIDIA GPU PyTorch's CPU build is taken, and what
only GPU code needs is left out; where that build cannot be had, CUDA's is taken, with the libraries that it needs.

An interrupted run goes on where it stopped: the mark of a whole environment is removed first and written last, after
the version of every package was compared with its pin.
"""

import argparse
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moesaic.core.errors import ConfigError, MoesaicError
from moesaic.core.virtual_environment import VirtualEnvironment, has_nvidia_gpu, pins_here

ROOT = Path(__file__).parents[1]
PINS = {"cpu": ROOT / "constraints-cpu.txt", "cuda": ROOT / "constraints.txt"}
"""The pins by build of PyTorch, see ``images/pins.py``."""
PYTHONS = ((3, 11), (3, 14))
"""The oldest Python that is supported, and the first that is not."""
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
MARK = ".installed"


def refuse_unsupported(version: tuple[int, ...], system: str, machine: str) -> None:
    """Stop before anything is made where no set of pins exists.

    Raises:
        ConfigError: for a Python or a platform that is not supported.
    """
    if not PYTHONS[0] <= version[:2] < PYTHONS[1]:
        raise ConfigError(
            f"Python {'.'.join(map(str, version[:3]))} is not supported, 3.11 to 3.13 are; name one: "
            "make setup PYTHON=python3.12"
        )
    if (system, machine) not in PLATFORMS:
        raise ConfigError(
            f"{system} on {machine} is not supported; x86-64 and aarch64 Linux and macOS on Apple silicon are"
        )


def fingerprint() -> str:
    """Digest of all that decides what a whole environment holds."""
    decisive = [*PINS.values(), ROOT / "pyproject.toml"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in decisive)).hexdigest()


def set_up(folder: Path, wanted: str, say: Callable[[str], None]) -> None:
    """Make the environment whole.

    Args:
        folder: where it is, or will be.
        wanted: ``cpu``, ``cuda``, or ``auto`` for the build of PyTorch that suits this machine.
        say: takes a line of progress.

    Raises:
        ConfigError: if this machine is not supported.
        StageError: if an installation fails.
    """
    refuse_unsupported(tuple(sys.version_info), sys.platform, platform.machine())
    mark = folder / MARK
    if wanted == "auto" and mark.is_file() and mark.read_text() == fingerprint():
        mark.touch()
        return
    mark.unlink(missing_ok=True)
    environment = VirtualEnvironment(folder)
    environment.make()
    if wanted == "auto":
        wanted = "cuda" if has_nvidia_gpu() else "cpu"
    (torch,) = (pin for pin in pins_here(PINS["cuda"]) if pin.startswith("torch=="))
    build = environment.install_torch(torch, wanted, say)
    if (wanted, build) == ("cpu", "cuda"):
        say("the registry's PyTorch is the CUDA build: it needs several GB of CUDA libraries, without a GPU too")
    say(f"{len(pins_here(PINS[build]))} more packages")
    environment.install_pins(PINS[build])
    say("moesaic itself, editable")
    environment.install("--editable", ROOT)
    mark.write_text(fingerprint())


def main(arguments: list[str] | None = None) -> int:
    """Set up; the exit code."""
    parser = argparse.ArgumentParser(description="Make the environment of this checkout.")
    parser.add_argument("folder", type=Path, help="where it goes, such as .venv")
    parser.add_argument("--torch", choices=("auto", *PINS), default="auto", help="build of PyTorch (%(default)s)")
    given = parser.parse_args(arguments)
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"set-up [{time.monotonic() - begun:4.0f} s] {line}", flush=True)

    folder = Path(os.path.abspath(given.folder))
    try:
        set_up(folder, given.torch, say)
    except MoesaicError as failure:
        print(f"error: set-up: {failure}", file=sys.stderr)
        return 2
    say("done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

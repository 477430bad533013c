"""Programs with packages of their own: each has a virtual environment, which is created once and kept.

A virtual environment lies in the user's cache directory under the digest of its pins and of Python's version, so a new
pin makes a new one. It is complete once its mark is there; what a killed run left is replaced.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.cache import cache_directory
from moesaic.core.errors import ConfigError, StageError
from moesaic.core.files import locked, make_folder
from moesaic.core.virtual_environment import VirtualEnvironment, clean_variables, pins_here

_MARK = ".complete"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class OwnEnvironment:
    """A program and its virtual environment."""

    title: str
    """The program's name in messages."""
    program: str
    """The command that the packages provide, or ``python`` where it is its modules that are run."""
    variable: str
    """The environment variable that may name an installed program to use instead, as images do."""
    pins: Path
    """Exact versions of all its packages."""
    torch: str | None = None
    """The build of PyTorch that it needs: ``cpu`` or ``cuda``; None if it needs none."""

    @property
    def directory(self) -> Path:
        """The directory of the virtual environment for these pins and this version of Python."""
        decisive = f"{sys.version_info[:2]}\n{self.torch}\n{self.pins.read_text()}"
        return cache_directory(os.environ) / self.title.lower() / hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def find_program(self) -> Path:
        """The path of the program; its virtual environment is created if it does not exist.

        Raises:
            ConfigError: if the variable names no program.
            StageError: if the virtual environment cannot be created.
        """
        if given := os.environ.get(self.variable):
            if not os.access(given, os.X_OK) or Path(given).is_dir():
                raise ConfigError(
                    f"{self.variable} is {given!r}, which is no program; let it name {self.program}, or unset it"
                )
            return Path(given).absolute()
        home = self.directory
        make_folder(home.parent, cache_directory(os.environ))
        with locked(home.with_suffix(".lock")):
            if not (home / _MARK).is_file():
                self._make(home)
        return home / "bin" / self.program

    def _make(self, home: Path) -> None:
        def say(line: str) -> None:
            print(f"{self.title}'s environment, made once: {line}", file=sys.stderr, flush=True)

        pins = pins_here(self.pins)
        shutil.rmtree(home, ignore_errors=True)
        try:
            environment = VirtualEnvironment(home)
            environment.make()
            if self.torch is not None:
                (torch,) = (pin for pin in pins if pin.startswith("torch=="))
                if (build := environment.install_torch(torch, self.torch, say)) != self.torch:
                    raise StageError(f"it needs PyTorch's {self.torch} build, and only the {build} build could be had")
            say(f"{len(pins)} packages into {home}; this takes minutes")
            environment.install_pins(self.pins)
            environment.compile()
        except StageError as failure:
            raise StageError(
                f"{self.title}'s environment cannot be made: {failure}\nIt needs a package index, once; without one, "
                f"let {self.variable} name {self.program} of an environment that has it"
            ) from failure
        (home / _MARK).touch()


def own_variables() -> dict[str, str]:
    """This process's environment variables for a program with packages of its own.

    Told to be offline, AIPerf would look for a tokenizer in a cache alone, and not where the tokenizer is.
    """
    return {name: value for name, value in clean_variables().items() if name not in _OFFLINE}


def program_version(program: Path, *arguments: str) -> str:
    """The last word of a program's output when it is asked for its version; StageError if it does not start."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=own_variables(), check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-500:]
        raise StageError(f"{program} {' '.join(arguments)} failed: {said}")
    return done.stdout.split()[-1]

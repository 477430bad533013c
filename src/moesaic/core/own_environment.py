"""Programs with packages of their own: each has a virtual environment, which is created once and kept.

A virtual environment lies in the user's cache directory under the digest of its pins and of Python's version, so a new
pin makes a new one. It is complete once its mark is there; what a killed run left is replaced.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.cache import cache_directory
from moesaic.core.errors import ConfigError, StageError

_MARK = ".complete"
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_MAKE_WITHIN_S = 3600.0
_SHOWN_LINES = 12


@dataclass(frozen=True)
class OwnEnvironment:
    """A program and its virtual environment."""

    title: str
    """The program's name in messages."""
    packages: tuple[str, ...]
    """The packages that pip installs."""
    program: str
    """The command that the packages provide."""
    variable: str
    """The environment variable that may name an installed program to use instead, as images do."""
    pins: str
    """Exact versions of all packages, as a constraints file."""

    @property
    def directory(self) -> Path:
        """The directory of the virtual environment for these pins and this version of Python."""
        decisive = f"{sys.version_info[:2]}\n{self.pins}"
        return cache_directory(os.environ) / self.program / hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def find_program(self) -> Path:
        """The path of the program; its virtual environment is created by pip if it does not exist.

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
        home.parent.mkdir(parents=True, exist_ok=True)
        with home.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (home / _MARK).is_file():
                self._make(home)
        return home / "bin" / self.program

    def _make(self, home: Path) -> None:
        print(
            f"{self.program}: making its environment in {home}, once; this takes minutes", file=sys.stderr, flush=True
        )
        shutil.rmtree(home, ignore_errors=True)
        self.call([sys.executable, "-m", "venv", str(home)])
        constraints = home / "constraints.txt"
        constraints.write_text(self.pins)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        self.call([*pip, "--constraint", str(constraints), *self.packages])
        (home / _MARK).touch()

    def call(self, command: list[str]) -> None:
        """Run one step of the installation; StageError, with its output, if it fails."""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=own_variables(), timeout=_MAKE_WITHIN_S, check=False
            )
        except subprocess.TimeoutExpired as late:
            raise StageError(
                f"{self.title}'s environment was not made within {_MAKE_WITHIN_S:g} s ({' '.join(command)})"
            ) from late
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()[-_SHOWN_LINES:]
            raise StageError(
                f"{self.title}'s environment cannot be made; it needs a package index, once. Without one, let "
                f"{self.variable} name an {self.program} that is installed. {' '.join(command)} said:\n"
                + "\n".join(f"  {line}" for line in lines)
            )


def own_variables() -> dict[str, str]:
    """This process's environment variables without those that would make the program use other packages than its own.

    Told to be offline, AIPerf would look for a tokenizer in a cache alone, and not where the tokenizer is.
    """
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


def program_version(program: Path, *arguments: str) -> str:
    """The last word of a program's output when it is asked for its version; StageError if it does not start."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=own_variables(), check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-500:]
        raise StageError(f"{program} {' '.join(arguments)} failed: {said}")
    return done.stdout.split()[-1]

"""Programs whose packages are not ours: each in an environment of its own, made once and kept, or found where it is.

An environment lies in the user's cache directory under the digest of its pins and of Python's version, so a new pin
makes a new one beside it. It counts as made once its mark is there; what a killed run left is made anew.
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
    """A program, and the environment it is installed into."""

    title: str
    """What messages call it."""
    packages: tuple[str, ...]
    """What pip installs."""
    program: str
    """The command that this brings."""
    variable: str
    """Environment variable: a program of this kind to use instead, as images do."""
    pins: str
    """Exact versions of all packages, as a constraints file."""

    @property
    def directory(self) -> Path:
        """Where the environment of these pins and this Python is, or will be."""
        decisive = f"{sys.version_info[:2]}\n{self.pins}"
        return cache_directory(os.environ) / self.program / hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def find_program(self) -> Path:
        """The program; its environment is made, by pip from its own index, if it is not there yet.

        Raises:
            ConfigError: if the variable names no program.
            StageError: if the environment cannot be made.
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
        """Run one step of making it; StageError, with what it printed, if it fails."""
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
    """This process's environment variables without those that would lead such a program to other packages than its own.

    Told to be offline, AIPerf would look for a tokenizer in a cache alone, and not where the tokenizer is.
    """
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


def program_version(program: Path, *arguments: str) -> str:
    """The last word of what a program prints when it is asked for its version; StageError if it does not start."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=own_variables(), check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-500:]
        raise StageError(f"{program} {' '.join(arguments)} failed: {said}")
    return done.stdout.split()[-1]

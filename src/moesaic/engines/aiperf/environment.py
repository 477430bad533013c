"""Where AIPerf is: where ``MOESAIC_AIPERF`` says, or in an environment that is made once and kept.

The environment lies in the user's cache directory under the digest of ``constraints.txt`` and of Python's version, so a
new pin makes a new one beside it. It counts as made once its mark is there; what a killed run left is made anew.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from moesaic.errors import ConfigError, StageError
from moesaic.store.s3_options import cache_directory

VARIABLE = "MOESAIC_AIPERF"
"""Environment variable: an ``aiperf`` program to use instead, as images do."""
_CONSTRAINTS = "constraints.txt"
_MARK = ".complete"
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_MAKE_WITHIN_S = 3600.0
_SHOWN_LINES = 12


def find_program() -> Path:
    """The ``aiperf`` program; the environment is made, by pip from its own index, if it is not there yet.

    Raises:
        ConfigError: if ``MOESAIC_AIPERF`` names no program.
        StageError: if the environment cannot be made.
    """
    if given := os.environ.get(VARIABLE):
        if not os.access(given, os.X_OK) or Path(given).is_dir():
            raise ConfigError(f"{VARIABLE} is {given!r}, which is no program; let it name aiperf, or unset it")
        return Path(given).absolute()
    home = environment_directory()
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _MARK).is_file():
            _make(home)
    return home / "bin" / "aiperf"


def environment_directory() -> Path:
    """Where the environment of these pins and this Python is, or will be."""
    decisive = f"{sys.version_info[:2]}\n{_constraints()}"
    return cache_directory(os.environ) / "aiperf" / hashlib.sha256(decisive.encode()).hexdigest()[:16]


def own_variables() -> dict[str, str]:
    """This process's environment variables without those that would lead AIPerf to other packages than its own.

    Told to be offline it would look for a tokenizer in a cache alone, and not where the tokenizer is.
    """
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


def _constraints() -> str:
    return (files(__package__) / _CONSTRAINTS).read_text()


def _make(home: Path) -> None:
    print(f"aiperf: making its environment in {home}, once; this takes minutes", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    _call([sys.executable, "-m", "venv", str(home)])
    constraints = home / _CONSTRAINTS
    constraints.write_text(_constraints())
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([*pip, "--constraint", str(constraints), "aiperf"])
    (home / _MARK).touch()


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=own_variables(), timeout=_MAKE_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise StageError(
            f"AIPerf's environment was not made within {_MAKE_WITHIN_S:g} s ({' '.join(command)})"
        ) from late
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-_SHOWN_LINES:]
        raise StageError(
            f"AIPerf's environment cannot be made; it needs a package index, once. Without one, let {VARIABLE} name an "
            f"aiperf that is installed. {' '.join(command)} said:\n" + "\n".join(f"  {line}" for line in lines)
        )

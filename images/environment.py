"""Make the environment that the Makefile's commands run in: exact pins, and no more than this machine can use.

Runs under any bare Python that is supported, and installs by uv where it is there, else by pip. On a machine without an
NVIDIA GPU PyTorch's CPU build is taken from PyTorch's own index, and what only GPU code needs is left out. Where that
index cannot be reached, the registry's build is taken, with the CUDA libraries that it needs.

An interrupted run goes on where it stopped: the mark of a whole environment is removed first and written last, after
the version of every package was compared with its pin.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = {"cpu": ROOT / "constraints-cpu.txt", "cuda": ROOT / "constraints.txt"}
"""The pins by build of PyTorch, see ``images/pins.py``."""
PYTHONS = ((3, 11), (3, 14))
"""The oldest Python that is supported, and the first that is not."""
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes its CPU builds; the registry has the CUDA build for Linux."""
MARK = ".installed"

_REACH_WITHIN_S = 10.0
_SHOWN_LINES = 15
_ADVICE = (
    (r"No space left", "free some disk: the CPU environment takes 3 GB, the one with CUDA 8 GB"),
    (
        r"resol|Connection|timed? ?out|ProxyError|unreachable|dns error|Network",
        "the package registry cannot be reached; look at the network, and at the variables HTTPS_PROXY, PIP_INDEX_URL "
        "and (for uv) UV_DEFAULT_INDEX",
    ),
    (r"CERTIFICATE|certificate|SSL", "the certificate is not trusted; name your authority's file in SSL_CERT_FILE"),
    (
        r"No matching distribution|No solution|no wheels|not found in the package registry",
        "the registry lacks a pinned version for this Python and machine; `make check-pins` says which",
    ),
    (r"Permission denied|externally-managed", "this folder cannot be written to; look at who owns it"),
)
_VERSIONS = """
import importlib.metadata, re, sys
for name, version in (line.split("==") for line in sys.stdin.read().split()):
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = "missing"
    if installed.partition("+")[0] != version:
        print(f"{name} is {installed}, not {version}")
"""
"""Runs in the new environment: which packages differ from the pins on standard input. Local versions do not count."""


class SetupError(Exception):
    """What failed, and what to do; the environment is not whole."""


def refuse_unsupported(version: tuple[int, ...], system: str, machine: str) -> None:
    """Stop before anything is made where no set of pins exists.

    Raises:
        SetupError: for a Python or a platform that is not supported.
    """
    if not PYTHONS[0] <= version[:2] < PYTHONS[1]:
        raise SetupError(
            f"Python {'.'.join(map(str, version[:3]))} is not supported, 3.11 to 3.13 are; name one: "
            "make setup PYTHON=python3.12"
        )
    if (system, machine) not in PLATFORMS:
        raise SetupError(
            f"{system} on {machine} is not supported; x86-64 and aarch64 Linux and macOS on Apple silicon are"
        )


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    program = shutil.which("nvidia-smi")
    if not program:
        return False
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def why_unreachable(url: str) -> str | None:
    """Why nothing answers at this address; None if something does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_REACH_WITHIN_S):
            return None
    except OSError as failure:
        return str(getattr(failure, "reason", failure))


class Environment:
    """One virtual environment, and the program that installs into it."""

    def __init__(self, folder: Path, uv: str | None) -> None:
        self.folder, self._uv = folder, uv
        self.python = folder / "bin" / "python"
        self.mark = folder / MARK

    def make(self) -> None:
        """Make it, or keep it if its own Python and pip run and are of this version.

        Raises:
            SetupError: if Python cannot make one.
        """
        same = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        if self.python.exists() and _run([self.python, "-c", same]).returncode == 0:
            return
        made = _run([sys.executable, "-m", "venv", "--clear", self.folder])
        if made.returncode:
            raise SetupError(
                f"{sys.executable} -m venv {self.folder} failed:\n{_last_lines(made)}\nOn Debian and Ubuntu, venv is a "
                f"package of its own: apt install python3-venv"
            )

    def install(self, *arguments: str | Path, from_cpu_index: bool = False) -> None:
        """Install without looking for dependencies: pins are complete.

        Raises:
            SetupError: with the end of what was printed, and what to do.
        """
        if self._uv:
            command = [self._uv, "pip", "install", "--quiet", "--python", self.python, "--no-deps"]
            command += ["--torch-backend", "cpu"] if from_cpu_index else []
        else:
            command = [
                self.python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-compile",
                "--no-deps",
            ]
            command += ["--index-url", CPU_INDEX] if from_cpu_index else []
        done = _run([*command, *arguments])
        if done.returncode:
            said = _last_lines(done)
            advice = [f"- {text}" for pattern, text in _ADVICE if re.search(pattern, said)]
            what = " ".join(map(str, [*command, *arguments]))
            raise SetupError(
                "\n".join([f"{what} failed:", said, *advice, "Run it again: it goes on where it stopped."])
            )

    def torch_build(self) -> str:
        """``cpu`` or ``cuda``: which build of PyTorch is installed, read from its files."""
        (path,) = self.folder.glob("lib/python*/site-packages/torch/version.py")
        return "cpu" if re.search(r"^cuda\b.*= None", path.read_text(), re.MULTILINE) else "cuda"

    def differences(self, pins: list[str]) -> list[str]:
        """Which installed versions are not the pinned ones."""
        compared = subprocess.run(
            [self.python, "-c", _VERSIONS], input="\n".join(pins), capture_output=True, text=True, check=True
        )
        return compared.stdout.splitlines()


def _run(command: list[str | Path]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_lines(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])


def pins_for(path: Path, system: str, python: tuple[int, ...]) -> list[str]:
    """``name==version`` of the lines that hold for a system and a Python; the file's markers are of these two kinds."""
    names = {"sys_platform": system, "python_version": python[:2]}
    pins = []
    for line in path.read_text().splitlines():
        pin, _, marker = line.partition(" ; ")
        if "==" in pin and all(_holds(clause, names) for clause in filter(None, marker.split(" and "))):
            pins.append(pin.strip())
    return pins


def _holds(clause: str, names: dict[str, object]) -> bool:
    """Whether ``sys_platform == 'linux'`` or ``python_version >= '3.12'`` holds."""
    parsed = re.fullmatch(r"(sys_platform|python_version) (==|>=|<) '([^']+)'", clause.strip())
    if parsed is None:
        raise SetupError(f"the pins hold a marker that is not understood: {clause!r}; `make pins` writes them anew")
    name, sign, text = parsed.groups()
    found = names[name]
    wanted = tuple(map(int, text.split("."))) if name == "python_version" else text
    return bool({"==": found == wanted, ">=": found >= wanted, "<": found < wanted}[sign])  # type: ignore[operator]


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
        SetupError: if this machine is not supported, or an installation fails.
    """
    system, python = sys.platform, tuple(sys.version_info)
    refuse_unsupported(python, system, platform.machine())
    uv = shutil.which("uv")
    environment = Environment(folder, uv)
    if wanted == "auto" and environment.mark.is_file() and environment.mark.read_text() == fingerprint():
        environment.mark.touch()
        return
    environment.mark.unlink(missing_ok=True)
    environment.make()
    if wanted == "auto":
        wanted = "cuda" if has_nvidia_gpu() else "cpu"
    (torch,) = (pin for pin in pins_for(PINS["cuda"], system, python) if pin.startswith("torch=="))
    say(f"{torch}, {wanted} build, by {'uv' if uv else 'pip'} into {folder}")
    own_index = wanted == "cpu" and system == "linux"
    if own_index and (why := why_unreachable(f"{CPU_INDEX}/torch/")):
        say(f"PyTorch's own index, {CPU_INDEX}, cannot be reached ({why}): the registry's build is taken instead")
        own_index = False
    environment.install(torch, from_cpu_index=own_index)
    build = environment.torch_build()
    if wanted == "cpu" and build == "cuda":
        say("the registry's PyTorch is the CUDA build: it needs several GB of CUDA libraries, without a GPU too")
    pins = pins_for(PINS[build], system, python)
    say(f"{len(pins)} more packages")
    environment.install("--requirement", PINS[build])
    say("moesaic itself, editable")
    environment.install("--editable", ROOT)
    if wrong := environment.differences(pins):
        raise SetupError(f"the environment is not as pinned: {'; '.join(wrong)}. Remove {folder} and run it again.")
    environment.mark.write_text(fingerprint())


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
    except SetupError as failure:
        print(f"error: set-up: {failure}", file=sys.stderr)
        return 2
    say("done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

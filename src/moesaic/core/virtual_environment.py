"""Virtual environments made from exact pins, and no more than this machine can use. Bare Python: set-up begins here.

Packages are installed by uv where it is there, else by pip, without looking for dependencies: pins are complete. On a
machine without an NVIDIA GPU PyTorch's CPU build is taken from PyTorch's own index; where that cannot be reached, the
registry's build is taken, which for Linux is the CUDA build.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from moesaic.core.errors import StageError
from moesaic.core.network import opener, site_variables

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes its CPU builds; the registry has the CUDA build for Linux."""
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT")
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


def clean_variables() -> dict[str, str]:
    """This process's environment variables, the site's completed, without what would bring packages elsewhere."""
    return {name: value for name, value in site_variables(os.environ).items() if name not in _FOREIGN}


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
        with opener(url).open(urllib.request.Request(url, method="HEAD"), timeout=_REACH_WITHIN_S):
            return None
    except (OSError, HTTPException) as failure:
        return str(getattr(failure, "reason", failure))


class VirtualEnvironment:
    """One virtual environment, and the program that installs into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._uv = folder, shutil.which("uv")
        self.python = folder / "bin" / "python"

    def make(self) -> None:
        """Make it, or keep it if its own Python and pip run and are of this version.

        Raises:
            StageError: if Python cannot make one.
        """
        same = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        if self.python.exists() and _run([self.python, "-c", same]).returncode == 0:
            return
        made = _run([sys.executable, "-m", "venv", "--clear", self.folder])
        if made.returncode:
            raise StageError(
                f"{sys.executable} -m venv {self.folder} failed:\n{_last_lines(made)}\nOn Debian and Ubuntu, venv is a "
                f"package of its own: apt install python3-venv"
            )

    def install(self, *arguments: str | Path, from_cpu_index: bool = False) -> None:
        """Install without looking for dependencies: pins are complete.

        Raises:
            StageError: with the end of what was printed, and what to do.
        """
        if self._uv:
            command: list[str | Path] = [self._uv, "pip", "install", "--quiet", "--python", self.python, "--no-deps"]
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
            raise StageError(
                "\n".join([f"{what} failed:", said, *advice, "Run it again: it goes on where it stopped."])
            )

    def install_torch(self, pin: str, build: str, say: Callable[[str], None]) -> str:
        """Install PyTorch; returns the build that could be had, ``cpu`` or ``cuda``.

        Args:
            pin: ``torch==version``.
            build: the one that is wanted.
            say: takes a line of progress.

        Raises:
            StageError: if it cannot be installed.
        """
        say(f"{pin}, {build} build, by {'uv' if self._uv else 'pip'} into {self.folder}")
        own_index = build == "cpu" and sys.platform == "linux"
        if own_index and (why := why_unreachable(f"{CPU_INDEX}/torch/")):
            say(f"PyTorch's own index, {CPU_INDEX}, cannot be reached ({why}): the registry's build is taken instead")
            own_index = False
        self.install(pin, from_cpu_index=own_index)
        return self._torch_build()

    def _torch_build(self) -> str:
        (path,) = self.folder.glob("lib/python*/site-packages/torch/version.py")
        return "cpu" if re.search(r"^cuda\b.*= None", path.read_text(), re.MULTILINE) else "cuda"

    def install_pins(self, path: Path) -> None:
        """Install all that a file of pins names for this machine, and compare what is there with it.

        Raises:
            StageError: if an installation fails, or a version is another.
        """
        self.install("--requirement", path)
        if wrong := self.differences(pins_here(path)):
            raise StageError(
                f"the environment is not as pinned: {'; '.join(wrong)}. Remove {self.folder} and run it again."
            )

    def compile(self) -> None:
        """Keep the bytecode of every module, for programs that start often and whose processes may not write it.

        Files that no Python of this version reads, such as templates, are left as they are.
        """
        (packages,) = self.folder.glob("lib/python*/site-packages")
        _run([self.python, "-m", "compileall", "-q", "-j", "0", packages])

    def differences(self, pins: list[str]) -> list[str]:
        """Which installed versions are not the pinned ones."""
        compared = subprocess.run(
            [self.python, "-c", _VERSIONS], input="\n".join(pins), capture_output=True, text=True, check=True
        )
        return compared.stdout.splitlines()


def _run(command: list[str | Path]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, env=clean_variables(), check=False)


def _last_lines(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])


def pins_here(path: Path) -> list[str]:
    """``name==version`` of the lines that hold on this machine."""
    return pins_for(path, sys.platform, platform.machine(), tuple(sys.version_info[:3]))


def pins_for(path: Path, system: str, machine: str, python: tuple[int, ...]) -> list[str]:
    """``name==version`` of the lines that hold for a system, a machine and a Python; markers are of these kinds."""
    names: dict[str, object] = {"sys_platform": system, "platform_machine": machine, "python_version": python[:2]}
    pins = []
    for line in path.read_text().splitlines():
        pin, _, marker = line.partition(" ; ")
        if "==" in pin and all(_holds(clause, names) for clause in filter(None, marker.split(" and "))):
            pins.append(pin.strip())
    return pins


def _holds(clause: str, names: dict[str, object]) -> bool:
    """Whether ``sys_platform == 'linux'`` or ``python_version >= '3.12'`` holds."""
    parsed = re.fullmatch(r"(sys_platform|platform_machine|python_version) (==|>=|<) '([^']+)'", clause.strip())
    if parsed is None:
        raise StageError(f"the pins hold a marker that is not understood: {clause!r}; `make pins` writes them anew")
    name, sign, text = parsed.groups()
    found = names[name]
    wanted = tuple(map(int, text.split("."))) if name == "python_version" else text
    return bool({"==": found == wanted, ">=": found >= wanted, "<": found < wanted}[sign])  # type: ignore[operator]

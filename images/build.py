"""Build every image, all at once: ``make build-images``, or ``python -m images.build --help``.

First our wheel and all that is pinned are fetched into one build context, as wheels for the images' Python; the builds
themselves then need no network but for their bases. With a registry the images are pushed, and ``images/lock.json``
says under which digests: compiling pipelines takes the images from there.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from images.requirements import FOLDER, PYTHON, ROOT, RUNTIMES, path_of, pins_in
from moesaic.core.errors import ConfigError, MoesaicError, StageError
from moesaic.core.virtual_environment import CPU_INDEX, why_unreachable

LOCK = FOLDER / "lock.json"
CONTEXT = ROOT / "build" / "images"
ENGINES = ("docker", "podman", "buildah")
_BASE = re.compile(r"^ARG BASE_IMAGE=(\S+)$", re.MULTILINE)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_THIS_MACHINE = re.compile(r"(localhost|127\.[\d.]+)(:\d+)?/")
"""Images in a registry on this machine, which may be without TLS."""
_SHOWN_LINES = 20


@dataclass(frozen=True)
class Plan:
    """What is built, with what, and where it goes."""

    engine: str
    version: str
    """The tag; from git unless given."""
    revision: str
    registry: str | None
    """``host/path``; None: the images stay on this machine."""
    context: Path
    bases: Mapping[str, str]
    """Other bases than the Containerfiles', by runtime."""

    def repository(self, name: str) -> str:
        """An image's name without its tag."""
        return f"{self.registry or 'localhost'}/moesaic/{name}"

    def reference(self, name: str) -> str:
        """An image's name and tag."""
        return f"{self.repository(name)}:{self.version}"

    def base(self, name: str) -> str:
        """The image that it is built on."""
        return self.bases.get(name) or base_of(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, push and write the lock; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        names = options.only or list(RUNTIMES)
        plan = _plan(options)
        prepare(plan.context, names, options.python, options.machine)
        digests = build_all(plan, names)
        if plan.registry and not options.only:
            LOCK.write_text(lock_text(plan, digests))
            print(f"wrote {LOCK.relative_to(ROOT)}; `make compile` takes the images from there")
    except MoesaicError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


def prepare(context: Path, names: Sequence[str], python: str, machine: str) -> None:
    """Lay out the build context: wheels, and for each image its pins and what must be there in the end."""
    shutil.rmtree(context, ignore_errors=True)
    (context / "wheels").mkdir(parents=True)
    shutil.copy(FOLDER / "install.py", context)
    pins: set[str] = set()
    of_programs: dict[Path, set[str]] = {}  # their versions may be others
    for name in names:
        (context / name).mkdir()
        shutil.copy(path_of(name), context / name)
        (context / name / "runtime.json").write_text(json.dumps(RUNTIMES[name].facts()))
        pins.update(pins_in(path_of(name)))
        for program, path in RUNTIMES[name].programs.items():
            (context / name / f"{program}.txt").write_text("\n".join(pins_in(path)) + "\n")
            of_programs[path] = set(pins_in(path))
    torch = {pin for pin in pins if pin.startswith("torch==")}  # only the image without a GPU brings its own
    if torch:
        fetch_wheels(sorted(torch), context / "wheels", python, machine, index=cpu_index())
    for group in (pins - torch, *(program - pins for program in of_programs.values())):
        fetch_wheels(sorted(group), context / "wheels", python, machine)
    _call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", context / "wheels", ROOT])


def cpu_index() -> str | None:
    """PyTorch's own index of CPU builds; None where it cannot be reached, and pip's own settings must name one."""
    return None if why_unreachable(f"{CPU_INDEX}/torch/") else CPU_INDEX


def fetch_wheels(pins: Sequence[str], target: Path, python: str, machine: str, index: str | None = None) -> None:
    """Download wheels for an image's Python; what is only published as source is made a wheel here."""
    glibc = [f"manylinux_2_{minor}_{machine}" for minor in range(34, 4, -1)]
    platforms = [*glibc, f"manylinux2014_{machine}", f"linux_{machine}", "any"]
    for_images = ["--python-version", python, *(part for one in platforms for part in ("--platform", one))]
    quiet = [sys.executable, "-m", "pip", "--quiet"]
    where = ["--index-url", index] if index else []
    _call([*quiet, "download", "--no-deps", "--dest", target, *where, *for_images, *pins])
    if sources := [path for path in target.iterdir() if path.suffix != ".whl"]:
        _call([*quiet, "wheel", "--no-deps", "--wheel-dir", target, *sources])
        for path in sources:
            path.unlink()


def build_all(plan: Plan, names: Sequence[str]) -> dict[str, str]:
    """Build all images side by side, and push them if there is a registry; their digests there.

    Raises:
        StageError: naming every image that failed, with the end of its log.
    """
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        under_way = {name: pool.submit(_build, plan, name) for name in names}
    failures = [str(error) for one in under_way.values() if (error := one.exception())]
    if failures:
        raise StageError("\n".join(failures))
    return {name: one.result() for name, one in under_way.items()}


def lock_text(plan: Plan, digests: Mapping[str, str]) -> str:
    """The lock: every image by its digest, and what it was built on."""
    images = {
        name: {"image": f"{plan.reference(name)}@{digest}", "base": plan.base(name)} for name, digest in digests.items()
    }
    found = {"version": plan.version, "revision": plan.revision, "images": images}
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def base_of(name: str) -> str:
    """The base that a Containerfile names."""
    found = _BASE.search((FOLDER / name / "Containerfile").read_text())
    assert found, "every Containerfile names its base"
    return found[1]


def _build(plan: Plan, name: str) -> str:
    """Build one image and push it; its digest, or nothing without a registry."""
    started = time.monotonic()
    values = {"VERSION": plan.version, "REVISION": plan.revision, "BASE_IMAGE": plan.base(name)}
    given = [part for key, value in values.items() for part in ("--build-arg", f"{key}={value}")]
    file = FOLDER / name / "Containerfile"
    log = plan.context / f"{name}.log"
    _call([plan.engine, "build", "--file", file, "--tag", plan.reference(name), *given, plan.context], log)
    digest = _push(plan, name, log) if plan.registry else ""
    print(f"{plan.reference(name)} in {time.monotonic() - started:.0f} s {digest}".rstrip(), flush=True)
    return digest


def _push(plan: Plan, name: str, log: Path) -> str:
    reference = plan.reference(name)
    if plan.engine == "docker":
        _call(["docker", "push", "--quiet", reference], log)
        shown = _call(["docker", "inspect", "--format", "{{json .RepoDigests}}", reference])
        of_registry = [one for one in json.loads(shown) if one.startswith(plan.repository(name) + "@")]
        digest: str = of_registry[0].partition("@")[2]
        return digest
    here = ["--tls-verify=false"] if _THIS_MACHINE.match(reference) else []  # as docker does
    with tempfile.NamedTemporaryFile("r") as file:
        _call([plan.engine, "push", *here, "--digestfile", file.name, reference], log)
        return file.read().strip()


def _call(command: Sequence[str | Path], log: Path | None = None) -> str:
    """Run to the end, its output in the log if there is one; what it wrote to standard output otherwise."""
    words = [str(part) for part in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if log else None, text=True)
    if log:
        with log.open("a") as file:
            file.write(result.stdout)
    if result.returncode:
        end = "\n".join(f"  {line}" for line in result.stdout.splitlines()[-_SHOWN_LINES:])
        where = f"; {log} ends with" if log else ""
        raise StageError(f"`{' '.join(words[:4])} ...` failed with exit status {result.returncode}{where}:\n{end}")
    return result.stdout


def _plan(options: argparse.Namespace) -> Plan:
    """Check the options before anything is fetched."""
    if shutil.which(options.engine) is None:
        raise ConfigError(f"{options.engine} is not installed; name one of {', '.join(ENGINES)} with ENGINE=")
    described = options.version or _git("describe", "--tags", "--always", "--dirty")
    version = described.removeprefix("v")
    if not _TAG.fullmatch(version):
        raise ConfigError(f"VERSION={version!r} cannot be an image's tag; use letters, digits, '.', '_' and '-'")
    if options.registry and version.endswith("-dirty"):
        raise ConfigError(
            "the work tree has uncommitted changes, so its images have no version; commit, or set VERSION="
        )
    bases = dict(pair.split("=", 1) for pair in options.base)
    if unknown := sorted(set(bases) - set(RUNTIMES)):
        raise ConfigError(f"--base names {unknown}; images are {', '.join(RUNTIMES)}")
    registry = options.registry.rstrip("/") if options.registry else None
    revision = "unknown" if options.version and not (ROOT / ".git").exists() else _git("rev-parse", "HEAD")
    return Plan(options.engine, version, revision, registry, options.context, bases)


def _git(*words: str) -> str:
    result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(f"git {' '.join(words)} failed here; build from a clone, or set VERSION=")
    return result.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m images.build", description="Build all images, all at once.")
    parser.add_argument("--engine", default="docker", choices=ENGINES, help="what builds (%(default)s)")
    parser.add_argument(
        "--registry", help="host/path to push to; without it the images stay here, and no lock is written"
    )
    parser.add_argument("--version", help="tag of the images (what `git describe` says)")
    parser.add_argument(
        "--only", action="append", choices=RUNTIMES, help="build this one; repeat for more; writes no lock"
    )
    parser.add_argument("--base", action="append", default=[], metavar="NAME=IMAGE", help="another base for one image")
    parser.add_argument("--python", default=PYTHON, help="Python of the bases (%(default)s)")
    parser.add_argument("--machine", default="x86_64", choices=("x86_64", "aarch64"), help="(%(default)s)")
    parser.add_argument(
        "--context", type=Path, default=CONTEXT, help="where to gather what is built from (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

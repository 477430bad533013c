"""Build the `search` image for real and run two components in it: ``make test-images``; prints the record as JSON.

The base is a Debian root made by mmdebstrap with torch and numpy, in place of NVIDIA's; all else is as on a cluster:
the Containerfile, the pinned wheels, the user. buildah builds and runs without a daemon (isolation ``chroot``). Then

- `moesaic doctor` runs, and the user is shown to write nowhere but to /scratch and to the usual temporary folders;
- `ingest` and `rank_experts` run as the compiled pipeline says, in the image and on this machine, on the tiny
  reasoner: rankings must be equal.

Needs root and Debian's packages buildah, crun and mmdebstrap, and a pip that finds a CPU build of torch.

Run: python benchmarks/image_build.py [--keep DIRECTORY]
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml

import moesaic
from images import build
from images.requirements import RUNTIMES, Requirement, closure, constraints
from moesaic.pipelines import compiled
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.records import describe_hardware
from moesaic.platform.store import Store
from moesaic.search.rank_experts.stage import RankExpertsConfig

EXAMPLE = Path("examples/tiny_reasoner")
DEBIAN, PYTHON = "bookworm", "3.11"
BASE, IMAGE = "localhost/moesaic/debian-torch:trial", "localhost/moesaic/search:trial"
SETS = {"calibration_short": "calibration_short", "calibration_long": "calibration_long", "prompts": "prompts"}
ISOLATED = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
Run = Callable[[Sequence[str], Mapping[str, str]], str]
"""Runs a command with variables of its own and returns what it printed."""


def call(*command: str | Path, **variables: str) -> str:
    """Run to the end; standard output."""
    words = [str(part) for part in command]
    result = subprocess.run(words, env=ISOLATED | variables, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(words[:4])} failed:\n{result.stdout}")
    return result.stdout.strip()


def make_base(directory: Path) -> None:
    """A Debian root with Python, and in it what NVIDIA's base brings for this image."""
    root, wheels = directory / "root.tar", directory / "base"
    packages = "--include=python3,python3-pip,ca-certificates"
    call("mmdebstrap", "--quiet", "--variant=minbase", packages, DEBIAN, root)
    pins = constraints()
    names = closure(map(Requirement, RUNTIMES["search"].base_brings), PYTHON) & pins.keys()  # Debian has setuptools.
    wheels.mkdir()
    build.fetch_wheels([f"{name}=={pins[name]}" for name in sorted(names)], wheels, PYTHON, platform.machine())
    (directory / "Containerfile").write_text(
        "FROM scratch\nADD root.tar /\n"
        "RUN --mount=type=bind,source=base,target=/wheels python3 -m pip install --quiet --no-index --no-deps"
        " --break-system-packages --root-user-action ignore /wheels/*.whl\n"
    )
    call("buildah", "build", "--quiet", "--tag", BASE, directory)


@contextlib.contextmanager
def container(mounted: Path):
    """A container of the image; yields what runs a command in it, as its user, with one folder mounted."""
    name = call("buildah", "from", IMAGE)

    def run(command: Sequence[str], variables: Mapping[str, str]) -> str:
        given = [part for key, value in variables.items() for part in ("--env", f"{key}={value}")]
        return call("buildah", "run", "--volume", f"{mounted}:{mounted}", *given, name, "--", *command)

    try:
        yield run
    finally:
        call("buildah", "rm", name)


def run_here(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """The same on this machine, in this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return call(*command, **{**variables, "PATH": path})


def run_component(run: Run, stage: str, config: str, inputs: Mapping[str, Path], directory: Path) -> dict[str, Path]:
    """Run a task's container command from the compiled pipeline, as Kubeflow would; where its outputs are."""
    specification = yaml.safe_load(compiled()["search"].read_text())
    task = stage.replace("_", "-")
    executor = specification["deploymentSpec"]["executors"][f"exec-{task}"]["container"]
    produced = specification["components"][f"comp-{task}"]["outputDefinitions"]["artifacts"]

    def artifact(name: str, place: Path, schema: str) -> dict[str, list[dict[str, object]]]:
        return {"artifacts": [{"name": name, "type": {"schemaTitle": schema}, "uri": str(place), "metadata": {}}]}

    outputs = {name: directory / stage / name for name in produced}
    executor_input = {
        "inputs": {
            "parameterValues": {"config": config, "version": moesaic.__version__},
            "artifacts": {name: artifact(name, place, "system.Artifact") for name, place in inputs.items()},
        },
        "outputs": {
            "artifacts": {
                name: artifact(name, place, produced[name]["artifactType"]["schemaTitle"])
                for name, place in outputs.items()
            },
            "outputFile": str(directory / stage / "outputs.json"),
        },
    }
    arguments = [part.replace("{{$}}", json.dumps(executor_input)) for part in executor["args"]]
    variables = {"MOESAIC_STORE": str(directory / "store"), "OMP_NUM_THREADS": "1"}
    run([*executor["command"], *arguments], variables)
    return outputs


def rank(run: Run, directory: Path) -> dict[str, object]:
    """Fill a store, run both components, and return the ranking."""
    store = Store.at(directory / "store")
    config = IngestConfig(
        parent=store.add_directory(EXAMPLE / "parent", "model", format="safetensors", producer="trial").id,
        tests=store.add_file(EXAMPLE / "data/test.jsonl", "dataset", format="jsonl", producer="trial").id,
        **{
            name: store.add_file(EXAMPLE / f"data/{name}.jsonl", "dataset", format="jsonl", producer="trial").id
            for name in SETS
        },
    )
    call("chmod", "--recursive", "a+rwX", directory)
    given = run_component(run, "ingest", config.to_json(), {}, directory)
    ranked = run_component(
        run,
        "rank_experts",
        RankExpertsConfig(max_sequences=8).to_json(),
        {name: given[name] for name in ("parent", "calibration_short")},
        directory,
    )
    found: dict[str, object] = json.loads((ranked["ranking"] / "ranking.json").read_text())
    return found


def writable(run: Run) -> list[str]:
    """Folders of the image that its user may write to."""
    tops = run(["sh", "-c", "find / -xdev -type d -writable -not -path '/proc/*' -prune 2>/dev/null | sort"], {})
    return tops.splitlines()


def measure(directory: Path) -> dict[str, object]:
    """Build, run, compare."""
    seconds = {}
    started = time.monotonic()
    make_base(directory)
    seconds["base"] = round(time.monotonic() - started)
    started = time.monotonic()
    options = ["--engine", "buildah", "--version", "trial", "--only", "search", "--base", f"search={BASE}"]
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    with contextlib.redirect_stdout(sys.stderr):
        failed = build.main([*options, "--python", PYTHON, "--context", str(directory / "context")])
    if failed:
        raise SystemExit("the image was not built")
    seconds["image"] = round(time.monotonic() - started)
    rankings = {}
    for where in ("image", "here"):
        (directory / where).mkdir()
    directory.chmod(0o755)
    with container(directory / "image") as run:
        doctor, folders = run(["moesaic", "doctor"], {}), writable(run)
        user = run(["id"], {})
        started = time.monotonic()
        rankings["image"] = rank(run, directory / "image")
        seconds["components"] = round(time.monotonic() - started)
    rankings["here"] = rank(run_here, directory / "here")
    if rankings["image"] != rankings["here"]:
        raise SystemExit(f"the rankings differ: {directory}")
    described = json.loads(call("buildah", "inspect", "--type", "image", IMAGE))
    return {
        "user": user,
        "writable_folders": folders,
        "labels": described["OCIv1"]["config"]["Labels"],
        "wheels_mib": round(sum(path.stat().st_size for path in (directory / "context/wheels").iterdir()) / 2**20, 1),
        "doctor_finds": sorted(words[1] for line in doctor.splitlines() if (words := line.split())[:1] == ["yes"]),
        "seconds": seconds,
        "rankings_equal": True,
    }


def main() -> None:
    """Run all of it and print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="work in this directory and leave it there")
    given = parser.parse_args()
    if lacking := [tool for tool in ("buildah", "crun", "mmdebstrap") if shutil.which(tool) is None]:
        raise SystemExit(f"not installed: {', '.join(lacking)}; apt-get install buildah crun mmdebstrap")
    with contextlib.ExitStack() as stack:
        directory = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        directory.mkdir(exist_ok=True, parents=True)
        found = measure(directory)
    tools = {tool: call(tool, "--version").splitlines()[0] for tool in ("buildah", "crun", "mmdebstrap")}
    record = {
        "command": "make test-images",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": describe_hardware(),
        "versions": {**tools, "debian": DEBIAN, "python": PYTHON, "kfp": version("kfp"), "torch": version("torch")},
    }
    print(json.dumps(record | found, indent=1))


if __name__ == "__main__":
    main()

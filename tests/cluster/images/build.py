"""Images for a cluster that reaches no registry but its own: ``python -m tests.cluster.images.build NAME ...``.

In the order in which they build on one another:

- ``base``: a Debian root with Python, in place of the base that ``images/cpu`` names; enough for the tests of faults;
- ``cpu``: that image, as ``make build-images`` makes it, on this base;
- ``servers``: ``cpu`` with what MLflow's server needs beside it, and moto for an S3;
- ``postgres``: Debian's PostgreSQL behind what the manifests use of the official image;
- ``nemo-rl``: ``cpu`` with Ray, NeMo-RL's own source and the versions that it pins;
- ``gpu-base``: the Debian root with what NVIDIA's bases bring, PyTorch's CPU build among it;
- ``search``, ``train``, ``rl``, ``serve``, ``kv``: those images on that base, or ``runtimes`` for all five at once.

Wheels are fetched here; builds download nothing. Needs root and Debian's buildah, crun and mmdebstrap.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from images.build import cpu_index, fetch_wheels
from images.build import main as build_images
from images.requirements import RUNTIMES, Requirement, closure, constraints, path_of, pins_in
from tests.recover import nemo_rl_environment

HERE = Path(__file__).parent
REGISTRY, VERSION = "localhost:5000", "0.1.0"
PLAIN = ("--quiet", "--tls-verify=false")
PUSH = (*PLAIN, "--compression-level=1")
DEBIAN, PYTHON = "bookworm", "3.11"
BASE, GPU_BASE = (f"localhost/moesaic/{name}:{DEBIAN}" for name in ("debian-python", "debian-torch"))
PACKAGES = {
    "base": "python3,python3-pip,ca-certificates,wget",  # KubeRay's probes are wget's
    "postgres": "postgresql",
}
"""Debian's, of the roots that images begin with."""
WORKER = "nemo_rl.models.policy.workers.dtensor_policy_worker_v2.DTensorPolicyWorkerV2"
"""Whose environment NeMo-RL's base has, and images/rl looks for."""
SOURCES = {"RL": ("nemo_rl", "examples/converters"), "Automodel": ("nemo_automodel",)}
"""Of each checkout of NeMo-RL's, what is run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=BUILDERS)
    for name in parser.parse_args().names:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="moesaic-image-") as directory:
            BUILDERS[name](Path(directory))
        print(f"{name} in {time.monotonic() - begun:.0f} s", flush=True)


def build_base(context: Path) -> None:
    """It stays here too, for what builds on it."""
    make_root("base", context)
    (context / "Containerfile").write_text("FROM scratch\nADD root.tar /\n")
    call("buildah", "build", "--quiet", "--tag", BASE, context)
    call("buildah", "push", *PUSH, BASE, f"docker://{REGISTRY}/moesaic/base:{VERSION}")


def build_gpu_base(context: Path) -> None:
    """It stays here too; pushed once, its layers are packed once."""
    brought = {name for runtime in RUNTIMES.values() for name in runtime.base_brings}
    pins, needed = constraints(), closure(map(Requirement, sorted(brought)), PYTHON)
    wheels = [f"{name}=={pins[name]}" for name in sorted(needed & pins.keys())]
    fetch([one for one in wheels if not one.startswith("torch==")], context)
    fetch_wheels([f"torch=={pins['torch']}"], context / "wheels", PYTHON, platform.machine(), index=cpu_index())
    (context / "Containerfile").write_text(
        f"FROM {BASE}\nRUN --mount=type=bind,target=/context python3 -m pip install --quiet --no-index --no-deps"
        " --break-system-packages --root-user-action ignore /context/wheels/*.whl\n"
        f"ENV NEMO_RL_VENV_DIR=/opt/ray_venvs\nRUN mkdir -p /opt/ray_venvs/{WORKER}/bin"
        f" && ln -s /usr/bin/python3 /opt/ray_venvs/{WORKER}/bin/python\n"
    )
    call("buildah", "build", "--quiet", "--tag", GPU_BASE, context)
    call("buildah", "push", *PUSH, GPU_BASE, f"docker://{REGISTRY}/moesaic/gpu-base:{VERSION}")


def build_runtimes(names: Sequence[str], context: Path) -> None:
    """The project's own images, as `make build-images` makes them."""
    os.environ.setdefault("BUILDAH_ISOLATION", "chroot")
    where = ["--engine", "buildah", "--registry", REGISTRY, "--version", VERSION, "--context", str(context)]
    bases = [part for one in names for part in ("--base", f"{one}={BASE if one == 'cpu' else GPU_BASE}")]
    if build_images([*where, *(part for one in names for part in ("--only", one)), *bases, "--python", PYTHON]):
        raise SystemExit(1)
    call("buildah", "rmi", *(f"{REGISTRY}/moesaic/{one}:{VERSION}" for one in names))


def build_servers(context: Path) -> None:
    fetch(pins_in(HERE / "servers.txt"), context)
    build("servers", context)


def build_postgres(context: Path) -> None:
    make_root("postgres", context)
    shutil.copy(HERE / "postgres.sh", context)
    build("postgres", context)


def build_nemo_rl(context: Path) -> None:
    """What ``cpu`` has at the same version is not brought again."""
    present = {pin.lower() for pin in pins_in(path_of("cpu"))}
    pins = [*pins_in(nemo_rl_environment.ENVIRONMENT.pins), *pins_in(HERE / "ray.txt")]
    fetch([pin for pin in pins if pin.lower().replace("_", "-") not in present], context)
    for checkout, (name, folders) in zip(nemo_rl_environment.find_sources(), SOURCES.items(), strict=True):
        for folder in folders:
            shutil.copytree(checkout / folder, context / "source" / name / folder)
    shutil.copy(HERE / "sitecustomize.py", context)
    build("nemo-rl", context)


BUILDERS = {
    "base": build_base,
    "servers": build_servers,
    "postgres": build_postgres,
    "nemo-rl": build_nemo_rl,
    "gpu-base": build_gpu_base,
    **{name: partial(build_runtimes, [name]) for name in RUNTIMES},
    "runtimes": partial(build_runtimes, [name for name in RUNTIMES if name != "cpu"]),
}


def make_root(name: str, context: Path) -> None:
    call("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES[name]}", DEBIAN, context / "root.tar")


def fetch(pins: list[str], context: Path) -> None:
    (context / "wheels").mkdir()
    fetch_wheels(pins, context / "wheels", PYTHON, platform.machine())


def build(name: str, context: Path) -> None:
    """Build and push, and leave nothing here: the registry has it."""
    image = f"{REGISTRY}/moesaic/{name}:{VERSION}"
    file = HERE / f"{name}.Containerfile"
    call("buildah", "build", *PLAIN, "--file", file, "--tag", image, context)
    call("buildah", "push", *PUSH, image)
    call("buildah", "rmi", image)


def call(*command: str | Path) -> None:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    if code := subprocess.run([str(part) for part in command], env=environment, stdout=sys.stderr).returncode:
        raise SystemExit(f"{' '.join(str(part) for part in command[:3])} ended with exit status {code}")


if __name__ == "__main__":
    main()

"""What every image installs on top of its base: exact pins, written by ``python -m images.requirements``.

An image gets all that its extras of moesaic need, however deep, but for what its base brings and guards (NVIDIA's
PyTorch and what is compiled against it). What is needed is read from the packages of this environment, versions from
``constraints.txt``; the images' Python is newer than this one, so markers are evaluated for theirs. What only GPU code
needs is not installed here and is brought by the bases: it is not looked into.
"""

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images.environment import PINS, ROOT
from moesaic.core.virtual_environment import pins_for

FOLDER = Path(__file__).parent
GPU_ONLY = (
    *("cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13"),
    *("quack-kernels", "triton"),
)
"""What PyTorch's CPU build and nothing of ours imports without a GPU; with them goes what they alone need."""
PYTHON = "3.12"
"""The Python of NVIDIA's images."""
EVERYWHERE = ("kfp", "mlflow-skinny")
"""What a task needs beside its stage: Kubeflow's executor (which imports nothing but kfp), and the MLflow client."""
WITHOUT_DEPENDENCIES = frozenset({"kfp"})

_AIPERF = ROOT / "src/moesaic/measure/benchmark_serving/aiperf/constraints.txt"
_TORCH = ("torch", "numpy", "setuptools")
_COMPILED = (
    *("torchao", "triton", "quack-kernels", "ninja", "pandas", "pillow", "pyarrow", "scikit-learn", "onnx"),
    *("tensorboard", "cuda-bindings", "einops"),
)
_MODELS = (*_TORCH, "transformers", "accelerate", "safetensors", "pydantic", "rich", "requests", "protobuf", "psutil")


@dataclass(frozen=True)
class Runtime:
    """What one image is for."""

    extras: tuple[str, ...]
    """Of moesaic's."""
    base_brings: tuple[str, ...]
    """Packages that stay as the base has them, with all that they need."""
    programs: dict[str, Path] = field(default_factory=dict)
    """Commands with packages of their own, and the file of their pins."""
    runs_pipelines: bool = False
    """Whether whole pipelines run in it, for which kfp needs all that it asks for; a task imports nothing of that."""
    without: tuple[str, ...] = ()
    """Packages that it does not have, though others ask for them."""

    def requirements(self, python: str = PYTHON) -> list[str]:
        """``name==version`` of all that is to be installed, sorted."""
        wanted = [*moesaic_requirements(self.extras), *(Requirement(name) for name in EVERYWHERE)]
        names = (
            closure(wanted, python, self._unread)
            - closure(map(Requirement, self.base_brings), python)
            - {*self.without}
        )
        pins = constraints()
        return [f"{name}=={pins[name]}" for name in sorted(names)]

    def facts(self) -> dict[str, list[str]]:
        """What ``install.py`` checks once all is installed."""
        wanted = [f"moesaic[{','.join(self.extras)}]", *EVERYWHERE]
        opaque = sorted({*self.base_brings, *self._unread})
        without = sorted(self.without)
        return {"wanted": wanted, "opaque": opaque, "programs": sorted(self.programs), "without": without}

    @property
    def _unread(self) -> frozenset[str]:
        """Packages whose dependencies are left out."""
        return frozenset() if self.runs_pipelines else WITHOUT_DEPENDENCIES


RUNTIMES = {
    "search": Runtime(("model", "search", "report", "export", "s3"), _TORCH),
    "train": Runtime(("train", "nemo", "jobs", "s3"), (*_TORCH, *_COMPILED)),
    "rl": Runtime(("rl", "jobs", "s3"), (*_MODELS, "datasets", "math-verify", "mlflow-skinny", "pyyaml")),
    "serve": Runtime(
        ("evaluate", "export", "serve", "s3"),
        _MODELS,
        {"aiperf": _AIPERF},
    ),
    "kv": Runtime(("kv", "s3"), (*_TORCH, "ninja", "nvidia-ml-py", "scipy")),
    "cpu": Runtime(
        ("local", "nemo", "jobs", "evaluate"), (), {"aiperf": _AIPERF}, runs_pipelines=True, without=GPU_ONLY
    ),
}
"""By name: the folder under ``images/``, the ``runtime`` in a component's metadata, the constant in ``components``."""


def moesaic_requirements(extras: Iterable[str]) -> Iterator[Requirement]:
    """What pyproject.toml asks for, moesaic's own extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from map(Requirement, project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == "moesaic":
                yield from moesaic_requirements(requirement.extras)
            else:
                yield requirement


def closure(
    wanted: Iterable[Requirement], python: str = PYTHON, unread: frozenset[str] = WITHOUT_DEPENDENCIES
) -> set[str]:
    """The names of these packages and of all that they need, but for what the ``unread`` ones need."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    todo, seen = list(wanted), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            needed = [] if name in {*unread, *GPU_ONLY} else distribution(name).requires or []
            for one in map(Requirement, needed):
                if one.marker is None or one.marker.evaluate({**environment, "extra": extra}):
                    todo.append(one)
    return {name for name, _ in seen}


def constraints() -> dict[str, str]:
    """Every version pinned for the images, by canonical name."""
    pins = (line.split("==") for line in pins_in(PINS["cuda"]))
    return {canonicalize_name(name): version for name, version in pins}


def pins_in(path: Path) -> list[str]:
    """``name==version`` of a file's lines that hold in the images."""
    return pins_for(path, "linux", "x86_64", tuple(map(int, PYTHON.split("."))))


def path_of(name: str) -> Path:
    """Where the pins of an image are committed."""
    return FOLDER / name / "requirements.txt"


def main() -> None:
    """Write them all."""
    for name, runtime in RUNTIMES.items():
        path_of(name).parent.mkdir(exist_ok=True)
        path_of(name).write_text("\n".join(runtime.requirements()) + "\n")


if __name__ == "__main__":
    main()

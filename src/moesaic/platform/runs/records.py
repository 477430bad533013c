"""The record beside every payload: the stage, its config and inputs, the code, the hardware, the time it took."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError
from moesaic.core.files import file_digest
from moesaic.core.version import __version__
from moesaic.platform.store import Manifest
from moesaic.platform.store.manifest import MANIFEST

RECORD = "record.json"
_PACKAGES = (
    "highspy",
    "kfp",
    "mlflow",
    "nemo-automodel",
    "nemo-toolkit",
    "numpy",
    "nvidia-modelopt",
    "safetensors",
    "torch",
    "transformers",
    "trl",
)


@dataclass(frozen=True)
class Record:
    """The record of one run of one stage."""

    stage: str
    subject: str
    """The model that the run is about, such as ``parent``, ``puzzle`` or ``random-0``; empty where it is about none."""
    config: Mapping[str, Any]
    config_digest: str
    inputs: Mapping[str, Any]
    """Content digests by input name."""
    versions: Mapping[str, str]
    code_digest: str
    hardware: Mapping[str, Any]
    seed: int | None
    metrics: Mapping[str, float]
    started: str
    """The time of the start: UTC, ISO 8601."""
    duration_s: float
    peak_memory_mib: float
    origins: Mapping[str, Any] = field(default_factory=dict)
    """The origins of the inputs by name, empty for one without a record."""

    @property
    def origin(self) -> str:
        """Digest of stage, subject, config, code, and the digests and origins of the inputs.

        It covers the whole history. Two ways to the same content have different origins but one content digest.
        """
        inputs = dict(self.inputs), dict(self.origins)
        decisive = [self.stage, self.subject, self.config_digest, self.code_digest, *inputs]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The content of ``record.json``."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def write(self, directory: Path) -> None:
        """Put ``record.json`` into an output directory."""
        (directory / RECORD).write_text(self.to_json())

    @classmethod
    def read(cls, directory: Path) -> "Record":
        """Read the record in an output directory."""
        path = directory / RECORD
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError as missing:
            raise ArtifactError(f"{directory} holds no {RECORD}: it is not the output of a stage") from missing


def subject_of(directory: Path) -> str:
    """The subject that the record in ``directory`` names, empty where there is no record."""
    return Record.read(directory).subject if (directory / RECORD).is_file() else ""


def origin_of(directory: Path) -> str:
    """The origin of what lies in ``directory``, empty where there is no record."""
    return Record.read(directory).origin if (directory / RECORD).is_file() else ""


def content_digest(path: Path) -> str:
    """Digest of a payload: the manifest's id where there is one, else of all names and contents but the record."""
    if (path / MANIFEST).is_file():
        return Manifest.read(path).id
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        if name != RECORD:
            digest.update(f"{name}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of Moesaic, Python and the packages whose numbers may differ between releases."""
    versions = {"moesaic": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Processor, memory and, where torch is loaded and sees them, GPUs."""
    torch = sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch and torch.cuda.is_available() else 0
    return {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads() if torch else 1,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": [torch.cuda.get_device_name(index) for index in range(gpus)] if torch else [],
    }


def peak_memory_mib() -> float:
    """The most memory this process has held so far; unlike ``ru_maxrss``, nothing of what started it is counted."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

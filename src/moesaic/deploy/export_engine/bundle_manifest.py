"""``export_manifest.json``: what a bundle is, where it comes from, and the digest of each of its files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moesaic.core.config import EmulatedCache
from moesaic.core.errors import ArtifactError
from moesaic.core.files import ListedFile, file_digest
from moesaic.deploy.export_engine.stage import ExportEngineConfig

MANIFEST = "export_manifest.json"
VALIDATION = "validation.json"
"""What the stage checked of the bundle; it cannot be among the files that it vouches for."""
_LEFT = ("__pycache__", "build")
_NOT_LISTED = frozenset({MANIFEST, VALIDATION, "record.json"})


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Layer(_Frozen):
    """One layer as the engine must build it."""

    num_local_experts: int
    """Experts."""
    num_experts_per_tok: int
    """Experts that each token uses."""
    intermediate_size: int
    """Channels of each expert."""
    sliding_window: int | None
    """Tokens that attention sees; None means all."""
    key_scale: float | None = None
    """What a unit of K in the FP8 cache stands for in the child; None where the cache is not calibrated."""
    value_scale: float | None = None
    """What a unit of V in the FP8 cache stands for in the child; None where the cache is not calibrated."""


class KvPolicy(_Frozen):
    """What the KV cache stores."""

    kind: EmulatedCache
    """BF16, FP8 at scale 1, or FP8 by calibrated scales."""
    scales: str
    """Where the scales are: ``none``, ``tensors`` of the checkpoint, or ``folded`` into its projections."""


class Source(_Frozen):
    """The checkpoint that was exported."""

    digest: str
    """Of the names and contents of all its files but its record."""
    steps: tuple[dict[str, Any], ...]
    """What was done to it since it was pruned."""
    pruning: dict[str, Any] | None
    """Which candidate it is and which experts of its parent it kept; None for a model that was never pruned."""


class BundleManifest(_Frozen):
    """What a bundle says of itself."""

    moesaic: str
    """Version of Moesaic that wrote the bundle."""
    engine: str
    """Versions of the engine that its files are written to."""
    config: ExportEngineConfig
    """As given to ``export_engine``."""
    max_seq_len: int
    """The longest request, where the config leaves it to the model."""
    kv_cache: KvPolicy
    """What the KV cache stores."""
    layers: tuple[Layer, ...]
    """In layer order."""
    source: Source
    """What was exported."""
    files: tuple[ListedFile, ...] = ()
    """Every file of the bundle but this one, sorted by path."""

    @classmethod
    def read(cls, bundle: Path) -> "BundleManifest":
        """The manifest of a bundle.

        Raises:
            ArtifactError: if there is none, or it is not one.
        """
        path = bundle / MANIFEST
        if not path.is_file():
            raise ArtifactError(f"{bundle} holds no {MANIFEST}; give a bundle of export_engine")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as invalid:
            first = invalid.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path}: {place}: {first['msg']}; export the model again") from invalid


def seal(bundle: Path, manifest: BundleManifest, digests: "Digests | None" = None) -> None:
    """Write the manifest of a bundle whose other files are all there."""
    known = digests or Digests()
    files = tuple(
        ListedFile(path=name, size_bytes=(bundle / name).stat().st_size, sha256=known.of(bundle / name))
        for name in _names(bundle)
    )
    sealed = manifest.model_copy(update={"files": files})
    (bundle / MANIFEST).write_text(sealed.model_dump_json(indent=1) + "\n")


def check_files(bundle: Path, manifest: BundleManifest) -> None:
    """Compare a bundle's files with its manifest, byte for byte.

    Raises:
        ArtifactError: if one is missing, changed, or not listed: an engine may read whatever lies in the directory.
    """
    listed = {entry.path: entry for entry in manifest.files}
    present = _names(bundle)
    if missing := sorted(set(listed) - set(present)):
        raise ArtifactError(f"{bundle / missing[0]} is missing; copy the bundle again")
    if unlisted := sorted(set(present) - set(listed)):
        raise ArtifactError(f"{bundle / unlisted[0]} is not in {MANIFEST}; remove it or export the model again")
    for name, entry in listed.items():
        if (size := (bundle / name).stat().st_size) != entry.size_bytes:
            raise ArtifactError(f"{bundle / name} has {size:,} bytes, {MANIFEST} says {entry.size_bytes:,}")
        if file_digest(bundle / name) != entry.sha256:
            raise ArtifactError(f"{bundle / name} was changed: its SHA-256 is not the one in {MANIFEST}")


class Digests:
    """SHA-256 of files; one that lies under several names is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str] = {}

    def of(self, path: Path) -> str:
        """The digest of one file."""
        status = path.stat()
        key = (status.st_dev, status.st_ino)
        if key not in self._known:
            self._known[key] = file_digest(path)
        return self._known[key]

    def of_all(self, directory: Path) -> str:
        """One digest of the names and contents of a directory's files."""
        lines = (f"{name}\0{self.of(directory / name)}\n" for name in _names(directory))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_files(bundle: Path, files: Mapping[str, str]) -> None:
    """Write text files of a bundle by their names, making folders."""
    for name, text in files.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(text, encoding="utf-8")


def _names(directory: Path) -> list[str]:
    """All files but those beside the payload, and but what importing or installing leaves behind."""
    files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    kept = (path for path in files if not any(part in _LEFT or part.endswith(".egg-info") for part in path.parts[:-1]))
    return sorted(path.as_posix() for path in kept if path.as_posix() not in _NOT_LISTED)

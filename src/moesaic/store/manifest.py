"""The manifest: a small JSON file that stands for a model or a data set wherever one is passed on."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesaic.errors import ArtifactError

Kind = Literal["model", "dataset"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

MANIFEST = "manifest.json"
"""Name of the file that holds a manifest inside an artifact's directory."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(_Frozen):
    """One file: where it lies inside the tree and what its content is."""

    path: str
    """Relative, with forward slashes; it cannot leave the tree."""
    size_bytes: Annotated[int, Field(ge=0)]
    """Length of the content."""
    sha256: Sha256
    """Digest of the content."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        pure = PurePosixPath(self.path)
        plain = str(pure) == self.path and "\\" not in self.path and "\0" not in self.path
        if not plain or pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ValueError(f"path {self.path!r} must be relative and stay inside the tree")
        return self


class Manifest(_Frozen):
    """Files that belong together, and where they come from. Its id is the digest of its canonical JSON."""

    kind: Kind
    """A model (a checkpoint directory) or a data set (one .jsonl)."""
    format: str
    """Such as ``safetensors`` or ``jsonl``."""
    producer: str
    """The stage that made it."""
    parents: tuple[Sha256, ...] = ()
    """Ids of the manifests it was made from."""
    config_digest: Sha256 | None = None
    """Digest of the config it was made with."""
    files: tuple[FileEntry, ...]
    """Sorted by path."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [entry.path for entry in self.files]
        if not paths:
            raise ValueError("a manifest needs at least one file")
        if paths != sorted(set(paths)):
            raise ValueError("files must be sorted by path and each path may occur once")
        folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        if clash := folders.intersection(paths):
            raise ValueError(f"{sorted(clash)} are both files and folders")
        return self

    @classmethod
    def parse(cls, text: str | bytes, where: object) -> Self:
        """Read a manifest; ``where`` names its source in errors.

        Raises:
            ArtifactError: if it is not a valid manifest.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as invalid:
            first = invalid.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "(the whole)"
            raise ArtifactError(f"{where} is not a manifest of Moesaic's store: {place}: {first['msg']}") from invalid

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the manifest that stands in an artifact's directory."""
        path = directory / MANIFEST
        try:
            return cls.parse(path.read_bytes(), path)
        except FileNotFoundError as missing:
            raise ArtifactError(f"{directory} holds no {MANIFEST}") from missing

    def to_json(self) -> str:
        """Canonical JSON: keys in order, indented, with a trailing newline."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n"

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size_bytes for entry in self.files)

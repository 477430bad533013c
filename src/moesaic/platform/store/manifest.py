"""The manifest: a small JSON file that stands for a model or a data set wherever one is passed on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from moesaic.core.errors import ArtifactError
from moesaic.core.files import ListedFile, Sha256

Kind = Literal["model", "dataset"]

MANIFEST = "manifest.json"
"""Name of the file that holds a manifest inside an artifact's directory."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Parts(_Frozen):
    """How a large file lies in a bucket: its consecutive parts are objects, each named by its own digest."""

    part_bytes: Annotated[int, Field(gt=0)]
    """Length of each part but the last, which may be shorter."""
    sha256: tuple[Sha256, ...]
    """Digests of the parts, in order."""


@dataclass(frozen=True)
class StoredObject:
    """An object of a bucket that holds a file or a part of it."""

    sha256: str
    """Digest of its content; part of its key."""
    start: int
    """Offset in the file of its first byte."""
    size_bytes: int

    @property
    def stop(self) -> int:
        """Offset in the file of the byte after its last."""
        return self.start + self.size_bytes


class FileEntry(ListedFile):
    """A file of the store's, and how it lies there."""

    parts: Parts | None = None
    """Set if it lies in a bucket in several objects."""

    @property
    def objects(self) -> tuple[StoredObject, ...]:
        """The objects of a bucket that hold the content, in order. A directory holds each file in one object."""
        if self.parts is None:
            return (StoredObject(self.sha256, 0, self.size_bytes),)
        starts = range(0, self.size_bytes, self.parts.part_bytes)
        return tuple(
            StoredObject(sha256, start, min(self.parts.part_bytes, self.size_bytes - start))
            for sha256, start in zip(self.parts.sha256, starts, strict=True)
        )

    @model_validator(mode="after")
    def _all_parts(self) -> Self:
        if self.parts is not None and len(self.parts.sha256) != -(-self.size_bytes // self.parts.part_bytes):
            raise ValueError(f"{len(self.parts.sha256)} parts do not make {self.size_bytes} bytes")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_no_parts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return fields if self.parts else {name: value for name, value in fields.items() if name != "parts"}


class Manifest(_Frozen):
    """Files that belong together, and where they come from.

    Its id is the digest of its canonical JSON without the files' parts: it tells what the content is, wherever it lies.
    """

    kind: Kind
    """A model (a checkpoint directory) or a data set (one .jsonl)."""
    format: str
    """The file format, such as ``safetensors`` or ``jsonl``."""
    producer: str
    """The stage that wrote the files."""
    parents: tuple[Sha256, ...] = ()
    """Ids of the manifests of the inputs."""
    config_digest: Sha256 | None = None
    """Digest of the stage's config."""
    source: str | None = None
    """Where the files were fetched from, with the commit: ``hf://OWNER/NAME@COMMIT``."""
    files: tuple[FileEntry, ...]
    """All files, sorted by path."""

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

    @model_serializer(mode="wrap")
    def _leave_out_no_source(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return fields if self.source else {name: value for name, value in fields.items() if name != "source"}

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
            field = ".".join(str(part) for part in first["loc"]) or "(the whole)"
            raise ArtifactError(f"{where} is not a manifest of Moesaic's store: {field}: {first['msg']}") from invalid

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
        return _canonical(self.model_dump(mode="json"))

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON without the files' parts."""
        fields = self.model_dump(mode="json")
        for file in fields["files"]:
            file.pop("parts", None)
        return hashlib.sha256(_canonical(fields).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size_bytes for entry in self.files)


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, indent=1) + "\n"

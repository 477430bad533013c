"""Files: written atomically, even if the process is killed, and identified by path and digest."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A digest in hexadecimal."""


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; its file or directory is renamed to ``path`` when the block succeeds.

    What a killed run left at the temporary path is removed first. One process at a time may write a path. A file is
    replaced; a directory must not exist yet.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    yield partial
    partial.replace(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Write or replace a text file atomically."""
    with written_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ListedFile(BaseModel):
    """One file of a list: where it lies inside a tree and what its content is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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

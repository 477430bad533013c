"""Where objects lie. A root keeps bytes under keys and knows nothing of manifests; object stores fit behind it too."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moesaic.errors import ArtifactError, StageError

_TOPS = ("objects/", "manifests/", "records/", "unlogged/")
"""What keys start with."""


@dataclass(frozen=True)
class Item:
    """Something that lies under a root: an object, or what an interrupted writer left of one."""

    key: str
    size_bytes: int
    modified_s: float
    """When it was last written, in seconds since 1970."""
    upload_id: str | None = None
    """Set if it is an unfinished upload to an object store."""


class Root(Protocol):
    """Object operations. Objects never change: writing a key that exists with the same size may do nothing."""

    @property
    def address(self) -> str:
        """How a user names this root; shown in errors."""

    def size(self, key: str) -> int | None:
        """Bytes of the object, None if there is none."""

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """The sizes of several objects."""

    def read(self, key: str) -> bytes:
        """A small object's content; FileNotFoundError if there is none."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes of an object from the byte ``start`` on; FileNotFoundError if there is none."""

    def digest(self, key: str) -> str:
        """SHA-256 of the object's content as it lies under the root, in hexadecimal."""

    def write(self, key: str, content: bytes) -> None:
        """Store a small object, whole or not at all; where the key is taken, an object store keeps what it has."""

    def put_files(self, sources: Sequence[Path], *, move: bool) -> list[str]:
        """Store files as objects, each whole or not at all, but for those that are here; returns their SHA-256.

        ``move`` allows to consume the files.

        Raises:
            ArtifactError: if a file is found to change meanwhile.
        """

    def local_files(self, sizes: Mapping[str, int], *, verify: bool = False) -> dict[str, Path]:
        """Files with the content of objects, by SHA-256, of which also the sizes are given; nobody may write to them.

        Where the root is remote they are fetched first.

        Raises:
            ArtifactError: if an object is damaged; always checked after fetching, else only with ``verify``.
        """

    def items(self, prefix: str) -> Iterable[Item]:
        """All objects whose keys start with ``prefix``."""

    def leftovers(self) -> Iterable[Item]:
        """What interrupted writers left; a writer at work has such things too, so mind their age."""

    def delete(self, item: Item) -> None:
        """Remove an object or a leftover; it may be gone already."""


class DirectoryRoot:
    """A root in a directory: on a laptop's disk, or a volume that all tasks mount."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def address(self) -> str:
        """See :class:`Root`."""
        return str(self.directory)

    def size(self, key: str) -> int | None:
        """See :class:`Root`."""
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return None

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """See :class:`Root`."""
        return [self.size(key) for key in keys]

    def read(self, key: str) -> bytes:
        """See :class:`Root`."""
        return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`Root`."""
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def digest(self, key: str) -> str:
        """See :class:`Root`."""
        return file_digest(self._path(key))

    def write(self, key: str, content: bytes) -> None:
        """See :class:`Root`."""
        with self._arriving(key) as partial:
            partial.write_bytes(content)

    def put_files(self, sources: Sequence[Path], *, move: bool) -> list[str]:
        """See :class:`Root`; an object that is here already becomes young again, for a writer relies on it."""
        return [self._put_file(source, move) for source in sources]

    def local_files(self, sizes: Mapping[str, int], *, verify: bool = False) -> dict[str, Path]:
        """See :class:`Root`."""
        for sha256 in sizes:
            if verify and self.digest(object_key(sha256)) != sha256:
                raise damaged(object_key(sha256), self.address)
        return {sha256: self._path(object_key(sha256)) for sha256 in sizes}

    def items(self, prefix: str) -> Iterator[Item]:
        """See :class:`Root`."""
        return (item for item in self._files(prefix) if not _is_hidden(item.key))

    def leftovers(self) -> Iterator[Item]:
        """See :class:`Root`."""
        return (item for top in _TOPS for item in self._files(top) if _is_hidden(item.key))

    def delete(self, item: Item) -> None:
        """See :class:`Root`."""
        self._path(item.key).unlink(missing_ok=True)

    def _put_file(self, source: Path, move: bool) -> str:
        size_bytes, sha256 = source.stat().st_size, file_digest(source)
        key = object_key(sha256)
        if self.size(key) == size_bytes:
            os.utime(self._path(key))
            return sha256
        with self._arriving(key) as partial:
            if move:
                shutil.move(source, partial)
                return sha256
            shutil.copyfile(source, partial)
            if file_digest(partial) != sha256:
                raise changed_while_added(source)
        return sha256

    def _path(self, key: str) -> Path:
        return self.directory / key

    def _files(self, prefix: str) -> Iterator[Item]:
        for path in sorted((self.directory / prefix).rglob("*")):
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue  # A writer has just moved it into place.
            if path.is_file():
                yield Item(path.relative_to(self.directory).as_posix(), found.st_size, found.st_mtime)

    @contextmanager
    def _arriving(self, key: str) -> Iterator[Path]:
        """A private path whose file takes its place under ``key`` on success, and vanishes on failure."""
        target = self._path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with explained_disk_full(self.directory):
                yield partial
                partial.chmod(0o444)
                os.utime(partial)
                _sync(partial)
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def object_key(sha256: str) -> str:
    """The key of the object with this content."""
    return f"objects/sha256/{sha256[:2]}/{sha256}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_while_added(source: Path) -> ArtifactError:
    """The error for a file that somebody writes to while it is being stored."""
    return ArtifactError(f"{source} changed while it was added to the store; add it again once it is finished")


def damaged(key: str, address: str) -> ArtifactError:
    """The error for an object whose content is not what its name says."""
    return ArtifactError(
        f"{key} in {address} has another content than its digest says; remove it and add its model or data set again"
    )


@contextmanager
def explained_disk_full(directory: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into an error that says which disk and what to do."""
    try:
        yield
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(f"the disk that holds {directory} is full; free space and run again") from failure


def _is_hidden(key: str) -> bool:
    return key.rpartition("/")[2].startswith(".")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

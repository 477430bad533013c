"""Roots: where a store keeps its objects, as bytes under keys. A root knows nothing of manifests."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from moesaic.core.errors import ArtifactError
from moesaic.core.files import explained_file_errors, file_digest, make_folder, set_mode, where_allowed
from moesaic.platform.store.manifest import FileEntry

_TOPS = ("objects/", "manifests/", "records/", "unlogged/")
"""The prefixes of all keys."""
_VERIFIERS = 4


@dataclass(frozen=True)
class Item:
    """An object under a root, or the part of one that an interrupted writer left."""

    key: str
    size_bytes: int
    modified_s: float
    """When it was last written, or a writer last relied on it, in seconds since 1970."""


class Root(Protocol):
    """Operations on objects. Objects never change, so writing an existing key with the same size may do nothing."""

    @property
    def address(self) -> str:
        """The address of this root, for messages."""

    def size(self, key: str) -> int | None:
        """Bytes of the object, None if there is none."""

    def read(self, key: str) -> bytes:
        """A small object's content; FileNotFoundError if there is none."""

    def read_range(self, entry: FileEntry, start: int, length: int) -> bytes:
        """``length`` bytes of a file from the byte ``start`` on, fewer if it ends before.

        Raises:
            ArtifactError: if an object of the file is missing.
        """

    def problems(self, entries: Iterable[FileEntry], *, read: bool = False) -> list[str]:
        """What is wrong with the objects of these files, in words; only with ``read`` are their digests recomputed."""

    def write(self, key: str, content: bytes) -> None:
        """Store a small object, whole or not at all; where the key is taken, an object store keeps what it has."""

    def put_files(self, files: Mapping[str, Path], *, move: bool) -> tuple[FileEntry, ...]:
        """Store files as objects, except those that exist already. ``files`` has their paths in the tree as keys.

        Each object appears whole or not at all. With ``move`` the files may be moved instead of copied.

        Raises:
            ArtifactError: if a file changes meanwhile.
        """

    def local_files(self, entries: Iterable[FileEntry], *, verify: bool = False) -> dict[str, Path]:
        """Files with the content of these entries, by SHA-256; nobody may write to them.

        Where the root is remote they are fetched first.

        Raises:
            ArtifactError: if an object is missing or damaged; ``verify`` checks also what is not fetched only now.
        """

    def items(self, prefix: str) -> Iterable[Item]:
        """All objects whose keys start with ``prefix``."""

    def leftovers(self) -> Iterable[Item]:
        """Files that interrupted writers left. A writer at work has such files too, so their age matters."""

    def delete(self, item: Item) -> None:
        """Remove an object or a leftover; it may be gone already."""


class DirectoryRoot:
    """A root in a directory: on a laptop's disk, or a volume that all tasks mount.

    Several users may share it: who may write to the directory may write to all folders in it. Objects are read-only,
    and nobody needs to change what someone else wrote.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def address(self) -> str:
        """The address of this root, for messages."""
        return str(self.directory)

    def size(self, key: str) -> int | None:
        """The number of bytes of an object; None if there is none."""
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, key: str) -> bytes:
        """The content of a small object."""
        return self._path(key).read_bytes()

    def read_range(self, entry: FileEntry, start: int, length: int) -> bytes:
        """Read a part of a file."""
        try:
            return file_range(self._path(object_key(entry.sha256)), start, length)
        except FileNotFoundError as missing:
            raise ArtifactError(describe_problem(entry, entry.sha256, self.address, "is missing")) from missing

    def problems(self, entries: Iterable[FileEntry], *, read: bool = False) -> list[str]:
        """What is wrong with the objects of these files."""
        with ThreadPoolExecutor(_VERIFIERS) as pool:
            results = pool.map(lambda entry: self._problem(entry, read), entries)
            return [problem for problem in results if problem]

    def write(self, key: str, content: bytes) -> None:
        """Store a small object."""
        with self._written_whole(key) as partial:
            partial.write_bytes(content)

    def put_files(self, files: Mapping[str, Path], *, move: bool) -> tuple[FileEntry, ...]:
        """Store files as objects. The time of an object that exists is renewed, so that gc keeps it for this writer."""
        return tuple(self._put_file(name, source, move) for name, source in files.items())

    def local_files(self, entries: Iterable[FileEntry], *, verify: bool = False) -> dict[str, Path]:
        """Paths of local files with the content of these entries, by SHA-256."""
        by_digest = {entry.sha256: entry for entry in entries}
        for problem in self.problems(by_digest.values(), read=verify):
            raise ArtifactError(problem)
        return {sha256: self._path(object_key(sha256)) for sha256 in by_digest}

    def items(self, prefix: str) -> Iterator[Item]:
        """All objects whose keys start with ``prefix``; a hidden file beside one says that a writer uses it."""
        files, used_s = list(self._files(prefix)), dict[str, float]()
        for hidden in (file for file in files if _is_hidden(file.key)):
            folder, _, name = hidden.key.rpartition("/")
            key = f"{folder}/{name[1:].rpartition('.')[0]}"
            used_s[key] = max(used_s.get(key, 0.0), hidden.modified_s)
        for file in files:
            if not _is_hidden(file.key):
                yield replace(file, modified_s=max(file.modified_s, used_s.get(file.key, 0.0)))

    def leftovers(self) -> Iterator[Item]:
        """Files that interrupted writers left."""
        return (item for top in _TOPS for item in self._files(top) if _is_hidden(item.key))

    def delete(self, item: Item) -> None:
        """Remove an object or a leftover."""
        self._path(item.key).unlink(missing_ok=True)

    def _problem(self, entry: FileEntry, read: bool) -> str | None:
        path = self._path(object_key(entry.sha256))
        problem = problem_of_size(self.size(object_key(entry.sha256)), entry.size_bytes)
        if not problem and read and file_digest(path) != entry.sha256:
            problem = OTHER_CONTENT
        return describe_problem(entry, entry.sha256, self.address, problem) if problem else None

    def _put_file(self, name: str, source: Path, move: bool) -> FileEntry:
        entry = FileEntry(path=name, size_bytes=source.stat().st_size, sha256=file_digest(source))
        key = object_key(entry.sha256)
        if self.size(key) == entry.size_bytes:
            self._renew(key)
            return entry
        with self._written_whole(key) as partial:
            if move:
                shutil.move(source, partial)
                return entry
            shutil.copyfile(source, partial)
            if file_digest(partial) != entry.sha256:
                raise changed_while_added(source)
        return entry

    def _renew(self, key: str) -> None:
        """Make an object as young as if it were written now; an empty hidden file says so for another user's."""
        path = self._path(key)
        try:
            os.utime(path)
        except OSError:
            with where_allowed():
                _hidden_beside(path).touch()

    def _path(self, key: str) -> Path:
        return self.directory / key

    def _files(self, prefix: str) -> Iterator[Item]:
        for path in sorted((self.directory / prefix).rglob("*")):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # A writer has just moved it into place.
            if path.is_file():
                yield Item(path.relative_to(self.directory).as_posix(), status.st_size, status.st_mtime)

    @contextmanager
    def _written_whole(self, key: str) -> Iterator[Path]:
        """A temporary path; its file gets the name ``key`` on success and is removed on failure."""
        target = self._path(key)
        partial = _hidden_beside(target)
        with explained_file_errors(self.directory):
            make_folder(target.parent, self.directory)
            try:
                yield partial
                set_mode(partial, 0o444)
                with where_allowed():
                    os.utime(partial)
                _sync(partial)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)


def object_key(sha256: str) -> str:
    """The key of the object with this content."""
    return f"objects/sha256/{sha256[:2]}/{sha256}"


def file_range(path: Path, start: int, length: int) -> bytes:
    """``length`` bytes of a file from the byte ``start`` on, fewer if it ends before."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def changed_while_added(source: Path) -> ArtifactError:
    """The error for a file that somebody writes to while it is being stored."""
    return ArtifactError(f"{source} changed while it was added to the store; add it again once it is finished")


OTHER_CONTENT = "has another content than its digest says"


def problem_of_size(size: int | None, expected: int) -> str | None:
    """What is wrong with the size of an object: it is missing or has another size; None if nothing is."""
    if size is None:
        return "is missing"
    return None if size == expected else f"has {size} bytes instead of {expected}"


def describe_problem(entry: FileEntry, sha256: str, address: str, problem: str) -> str:
    """A message: what is wrong with an object of a file, and what to do."""
    where = f"object {object_key(sha256)} ({entry.path}) in {address}"
    return f"{where} {problem}; remove it and add its model or data set again"


def _hidden_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _is_hidden(key: str) -> bool:
    return key.rpartition("/")[2].startswith(".")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Where objects lie. A root keeps bytes under keys and knows nothing of manifests; object stores fit behind it too."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from moesaic.errors import StageError


class Root(Protocol):
    """Object operations. Objects never change: writing a key that exists with the same size may do nothing."""

    def size(self, key: str) -> int | None:
        """Bytes of the object, None if there is none."""

    def read(self, key: str) -> bytes:
        """A small object's content; FileNotFoundError if there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Store a small object, whole or not at all."""

    def put_file(self, key: str, source: Path) -> None:
        """Store a file, whole or not at all; the source may be consumed."""

    def local_file(self, key: str) -> Path:
        """A file with the object's content, fetched first where the root is remote; nobody may write to it."""


class DirectoryRoot:
    """A root in a directory: on a laptop's disk, or a volume that all tasks mount."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def size(self, key: str) -> int | None:
        """See :class:`Root`."""
        try:
            return self.local_file(key).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, key: str) -> bytes:
        """See :class:`Root`."""
        return self.local_file(key).read_bytes()

    def write(self, key: str, content: bytes) -> None:
        """See :class:`Root`."""
        with self._arriving(key) as partial:
            partial.write_bytes(content)

    def put_file(self, key: str, source: Path) -> None:
        """See :class:`Root`."""
        with self._arriving(key) as partial:
            shutil.move(source, partial)

    def local_file(self, key: str) -> Path:
        """See :class:`Root`."""
        return self.directory / key

    @contextmanager
    def _arriving(self, key: str) -> Iterator[Path]:
        """A private path whose file takes its place under ``key`` on success, and vanishes on failure."""
        target = self.local_file(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with explained_disk_full(self.directory):
                yield partial
                partial.chmod(0o444)
                _sync(partial)
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def explained_disk_full(directory: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into an error that says which disk and what to do."""
    try:
        yield
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(f"the disk that holds {directory} is full; free space and run again") from failure


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

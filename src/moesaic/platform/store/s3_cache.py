"""The cache of a bucket: complete files under the keys of their objects, and partial files while they are fetched.

A file in progress needs no journal: a part of it is done if it has the digest that it should have.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import StageError
from moesaic.core.files import explained_file_errors, file_digest, locked, make_folder, set_mode, where_allowed
from moesaic.platform.store.manifest import FileEntry, StoredObject
from moesaic.platform.store.root import object_key

_CHUNK_BYTES = 2**18


@dataclass(frozen=True)
class Cache:
    """The cache of one bucket, in a directory."""

    directory: Path

    def path(self, entry: FileEntry) -> Path:
        """The path of the complete file."""
        return self.directory / object_key(entry.sha256)

    def partial(self, entry: FileEntry) -> Path:
        """The path of the file while it is fetched."""
        return self.path(entry).with_name(f".{entry.sha256}.partial")

    def missing(self, entries: Sequence[FileEntry]) -> list[FileEntry]:
        """The entries whose files are not in the cache."""
        return [entry for entry in entries if not self.path(entry).exists()]

    def drop_damaged(self, entry: FileEntry, *, verify: bool) -> None:
        """Remove a file that has another digest than it should.

        Nobody waits until the disk has taken what was fetched. So a file is read again, even without ``verify``, once
        the machine has been started anew: its power may have failed.
        """
        path = self.path(entry)
        if not path.exists() or not (verify or _is_older_than_boot(path)):
            return
        if file_digest(path) == entry.sha256:
            with where_allowed():  # Another user's is read again each time.
                os.utime(path)  # Younger than the boot now.
        else:
            path.unlink()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the directory, so that one process at a time fetches into it."""
        with explained_file_errors(self.directory):
            make_folder(self.directory, self.directory)
            with locked(self.directory / ".lock"):
                yield

    def begin(self, entries: Sequence[FileEntry]) -> None:
        """Make the partial files of these entries.

        Raises:
            StageError: if the disk has no room for what they lack.
        """
        needed_bytes = 0
        for entry in entries:
            make_folder(self.path(entry).parent, self.directory)
            if self.partial(entry).exists() and not os.access(self.partial(entry), os.W_OK):
                self.partial(entry).unlink()  # Another user was interrupted.
            self.partial(entry).touch()
            needed_bytes += entry.size_bytes - self.partial(entry).stat().st_blocks * 512
        free_bytes = shutil.disk_usage(self.directory).free
        if needed_bytes > free_bytes:
            raise StageError(
                f"{self.directory} has {free_bytes / 2**30:.1f} GiB free and {needed_bytes / 2**30:.1f} GiB more are "
                "needed; free space there, or let MOESAIC_CACHE name a directory on a larger disk"
            )

    def finish(self, entry: FileEntry) -> None:
        """Rename a partial file with all of its parts to its final path, read-only."""
        set_mode(self.partial(entry), 0o444)
        self.partial(entry).replace(self.path(entry))

    def keep(self, source: Path, entry: FileEntry) -> None:
        """Move a file that has been sent to the bucket into the cache."""
        make_folder(self.path(entry).parent, self.directory)
        set_mode(source, 0o444)
        try:
            source.replace(self.path(entry))
        except OSError:  # On another disk: not worth a copy.
            source.unlink()

    def add_to_digest(self, digest: "hashlib._Hash", entry: FileEntry, part: StoredObject) -> None:
        """Read a part of the partial file."""
        with self.partial(entry).open("rb") as file:
            file.seek(part.start)
            for start in range(0, part.size_bytes, _CHUNK_BYTES):
                digest.update(file.read(min(_CHUNK_BYTES, part.size_bytes - start)))

    def has_part(self, entry: FileEntry, part: StoredObject) -> bool:
        """Whether the partial file has this part."""
        digest = hashlib.sha256()
        self.add_to_digest(digest, entry, part)
        return digest.hexdigest() == part.sha256


def _is_older_than_boot(file: Path) -> bool:
    return file.stat().st_ctime < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

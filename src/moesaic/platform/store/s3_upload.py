"""Cut files into parts and send them from several threads; each file is read once, for its digest and its parts."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from moesaic.platform.store.manifest import FileEntry, Parts
from moesaic.platform.store.root import changed_while_added
from moesaic.platform.store.s3_options import S3Options


@dataclass(frozen=True)
class SentFile:
    """A file that has been read. Its parts may still be on their way; the futures give their digests."""

    name: str
    size_bytes: int
    sha256: str
    part_bytes: int
    digests: tuple[Future[str], ...]

    def entry(self) -> FileEntry:
        """Wait for the parts to arrive and describe the file; raises what a part failed with."""
        digests = tuple(digest.result() for digest in self.digests)
        parts = Parts(part_bytes=self.part_bytes, sha256=digests) if len(digests) > 1 else None
        return FileEntry(path=self.name, size_bytes=self.size_bytes, sha256=self.sha256, parts=parts)


class Sender:
    """Reads a part only once there is a free thread for it, so memory never holds more parts than there are threads."""

    def __init__(self, pool: Executor, options: S3Options, put: Callable[[bytes], str]) -> None:
        """``put`` stores a part and returns its digest."""
        self._pool, self._part_bytes, self._put = pool, options.part_bytes, put
        self._free = threading.Semaphore(options.connections)
        self._failure: BaseException | None = None

    def send(self, name: str, path: Path) -> SentFile:
        """Read a file and hand its parts to the threads; raises at once what a part of any file has failed with.

        Raises:
            ArtifactError: if the file is written to meanwhile.
        """
        whole, digests = hashlib.sha256(), []
        with path.open("rb") as file:
            before = path.stat()
            for _ in range(0, max(before.st_size, 1), self._part_bytes):
                self._free.acquire()
                if self._failure:
                    raise self._failure
                part = file.read(self._part_bytes)
                digests.append(self._pool.submit(self._store, part))
                whole.update(part)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise changed_while_added(path)
        return SentFile(name, before.st_size, whole.hexdigest(), self._part_bytes, tuple(digests))

    def _store(self, part: bytes) -> str:
        try:
            return self._put(part)
        except BaseException as failure:
            self._failure = failure
            raise
        finally:
            self._free.release()

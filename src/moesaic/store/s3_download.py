"""Fetch an S3 object into a file: parts at once, each checked, and those that are there already are not fetched again.

The file in progress needs no journal: a part of it is done if it has the digest that it should have.
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

from moesaic.errors import StageError
from moesaic.store.lanes import Lanes
from moesaic.store.root import damaged, explained_disk_full
from moesaic.store.s3_errors import error_code
from moesaic.store.s3_options import S3Options
from moesaic.store.s3_upload import PARTS

_CHUNK_BYTES = 2**18
"""Fits a processor's cache: of chunks four times as large, writing costs several times the system's seconds."""
_LONGEST_DELAY_S = 20.0
_ROUNDS = 3
"""How often what arrives damaged is fetched before the object itself is taken for damaged."""


@dataclass(frozen=True)
class _Part:
    start: int
    stop: int
    sha256: str | None
    """None where nobody wrote down the digests of the parts: then only the whole can be checked."""


@dataclass(frozen=True)
class Reader:
    """Reads objects of one bucket."""

    client: Any
    bucket: str
    options: S3Options

    def stream(self, key: str, start: int, stop: int, take: Callable[[bytes], object]) -> None:
        """Hand the bytes from ``start`` to ``stop`` to ``take``, chunk by chunk; go on where a connection broke off."""
        attempt = 1
        while start < stop:
            try:
                for chunk in self._chunks(key, start, stop):
                    take(chunk)
                    start += len(chunk)
                return
            except (HTTPClientError, IncompleteReadError):
                if attempt >= self.options.attempts:
                    raise
                self._wait(attempt)
                attempt += 1

    def read(self, key: str) -> bytes:
        """A small object's whole content; FileNotFoundError if there is none."""
        for attempt in range(1, self.options.attempts + 1):
            try:
                return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())
            except ClientError as failure:
                if error_code(failure) == "NoSuchKey":
                    raise FileNotFoundError(key) from failure
                raise
            except (HTTPClientError, IncompleteReadError):
                if attempt == self.options.attempts:
                    raise
                self._wait(attempt)
        raise AssertionError("the last attempt returns or raises")

    def fetch(self, key: str, size_bytes: int, sha256: str, target: Path, address: str, lanes: Lanes) -> None:
        """Make ``target`` a read-only file with the object's content; it appears whole or not at all.

        Raises:
            ArtifactError: if the object has another digest.
            StageError: if the disk is full.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        with _locked(partial) as descriptor, explained_disk_full(target.parent):
            if target.exists():  # Another process has fetched it meanwhile.
                partial.unlink()
                return
            if not self._fill(descriptor, key, self._layout(key, size_bytes, sha256), sha256, lanes):
                partial.unlink()
                raise damaged(key, address)
            partial.chmod(0o444)
            partial.replace(target)

    def _fill(self, descriptor: int, key: str, parts: list[_Part], sha256: str, lanes: Lanes) -> bool:
        """Fetch the parts that the file lacks until the whole has its digest; False if it never does."""
        wanted = _unlike(descriptor, parts)
        os.truncate(descriptor, parts[-1].stop if parts else 0)
        for _ in range(_ROUNDS):
            if self._fetch_parts(descriptor, key, parts, frozenset(wanted), lanes) == sha256:
                return True
            wanted = _unlike(descriptor, parts)
        return False

    def _chunks(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        answer = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        body = answer["Body"]
        try:
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {start}-{stop - 1}/"):
                raise StageError(f"{key} cannot be read in parts: asked for {start}-{stop - 1}, the server sent others")
            while chunk := body.read(_CHUNK_BYTES):
                yield chunk
        finally:
            body.close()

    def _fetch_parts(
        self, descriptor: int, key: str, parts: list[_Part], wanted: frozenset[_Part], lanes: Lanes
    ) -> str:
        """Fetch the parts wanted; returns the digest of the whole file, as it is on disk then."""
        whole = hashlib.sha256()

        def fetch(part: _Part) -> _Part:
            offset = part.start

            def take(chunk: bytes) -> None:
                nonlocal offset
                _write_at(descriptor, chunk, offset)
                offset += len(chunk)
                lanes.moved(len(chunk))

            if part in wanted:
                self.stream(key, part.start, part.stop, take)
            return part

        lanes.parts(fetch, parts, lambda part: _hash_range(whole, descriptor, part))
        return whole.hexdigest()

    def _layout(self, key: str, size_bytes: int, sha256: str) -> list[_Part]:
        """The parts to fetch, with the digests that their writer left; without those, parts of the usual size."""
        if size_bytes <= self.options.part_bytes:
            return [_Part(0, size_bytes, sha256)] if size_bytes else []
        part_bytes, digests = self._part_digests(key) or (self.options.part_bytes, [])
        starts = range(0, size_bytes, part_bytes)
        known = len(digests) == len(starts)
        return [
            _Part(start, min(start + part_bytes, size_bytes), digests[index] if known else None)
            for index, start in enumerate(starts)
        ]

    def _part_digests(self, key: str) -> tuple[int, list[str]] | None:
        """What the writer of the object left about its parts; None for an object that came here by other means."""
        try:
            found = json.loads(self.read(key + PARTS))
            return max(1, int(found["part_bytes"])), list(found["sha256"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _wait(self, attempt: int) -> None:
        longest = min(_LONGEST_DELAY_S, self.options.retry_delay_s * 2 ** (attempt - 1))
        time.sleep(longest * random.uniform(0.5, 1))


@contextmanager
def _locked(partial: Path) -> Iterator[int]:
    """The file in progress, held by this process alone and surely the one that now has this name."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_the_file(descriptor, partial):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_the_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlike(descriptor: int, parts: list[_Part]) -> list[_Part]:
    """The parts that are not in the file as they should be, or of which that cannot be told."""
    size_bytes = os.fstat(descriptor).st_size
    return [
        part
        for part in parts
        if part.sha256 is None or part.stop > size_bytes or _range_digest(descriptor, part) != part.sha256
    ]


def _range_digest(descriptor: int, part: _Part) -> str:
    digest = hashlib.sha256()
    _hash_range(digest, descriptor, part)
    return digest.hexdigest()


def _hash_range(digest: "hashlib._Hash", descriptor: int, part: _Part) -> None:
    room, offset = memoryview(bytearray(_CHUNK_BYTES)), part.start
    while num_bytes := os.preadv(descriptor, [room[: part.stop - offset]], offset):
        digest.update(room[:num_bytes])
        offset += num_bytes


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def check_space(directory: Path, sizes: Mapping[Path, int]) -> None:
    """Raise a StageError if the disk of ``directory`` has no room for what these targets of ``fetch`` lack."""
    directory.mkdir(parents=True, exist_ok=True)
    needed_bytes = sum(size - _fetched_bytes(target) for target, size in sizes.items())
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise StageError(
            f"{directory} has {free_bytes / 2**30:.1f} GiB free and {needed_bytes / 2**30:.1f} GiB more are needed; "
            "free space there, or let MOESAIC_CACHE name a directory on a larger disk"
        )


def _fetched_bytes(target: Path) -> int:
    try:
        return _partial(target).stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")

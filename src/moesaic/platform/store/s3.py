"""A root in an S3 bucket, or on any server that speaks S3's protocol.

A large file is cut into parts, each an object named by its own SHA-256; the manifest lists them. So a server need only
put, get, list and delete objects: what else is asked for (conditions, HEAD, ranges, the second form of listing) has
another way where a server refuses or ignores it. Resuming skips the parts that are there. Each part is checked when it
is fetched, and the whole file before it becomes visible.
"""

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
from botocore.handlers import set_list_objects_encoding_type_url

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.core.network import CLIENT_CERTIFICATE, check_files, proxy_for, site_variables
from moesaic.core.progress import count_bytes
from moesaic.platform.store.manifest import FileEntry, StoredObject
from moesaic.platform.store.root import OTHER_CONTENT, Item, describe_problem, file_range, object_key, problem_of_size
from moesaic.platform.store.s3_cache import Cache
from moesaic.platform.store.s3_errors import (
    error_code,
    explained_failures,
    lacks_feature,
    odd_answer,
    status_of,
)
from moesaic.platform.store.s3_options import S3Options, split_address
from moesaic.platform.store.s3_upload import Sender

Result = TypeVar("Result")

_CHUNK_BYTES = 2**18
_LONGEST_DELAY_S = 20.0


class S3Root:
    """Objects of one bucket under one prefix; see :class:`moesaic.platform.store.Root` for the operations."""

    def __init__(self, address: str, cache: Path, options: S3Options) -> None:
        """Connect to ``s3://bucket/prefix``; fetched files go to ``cache``.

        Raises:
            ConfigError: if the address, the bucket or the credentials cannot be used.
            StageError: if the server cannot be reached.
        """
        self.bucket, self._prefix = split_address(address)
        self.cache, self.options = Cache(cache), options
        self._address = address
        with explained_failures(address):
            self.client = connect(options)
            self._found("")  # HEAD would not say why it is refused

    @property
    def address(self) -> str:
        """The address of this root, for messages."""
        return self._address

    def size(self, key: str) -> int | None:
        """The number of bytes of an object; None if there is none."""
        with explained_failures(self.address):
            try:
                return int(self.client.head_object(**self._location(key))["ContentLength"])
            except ClientError as failure:
                if status_of(failure) == 404:
                    return None
                found = self._found(key)  # HEAD is refused, without words
        return None if found is None or found.key != key else found.size_bytes

    def read(self, key: str) -> bytes:
        """The content of a small object."""
        return self._repeated(lambda: b"".join(self._chunks(key, FileNotFoundError(key))))

    def read_range(self, entry: FileEntry, start: int, length: int) -> bytes:
        """Read a part of a file."""
        if (cached := self.cache.path(entry)).exists():
            return file_range(cached, start, length)

        def read(part: StoredObject) -> bytes:
            first, stop = max(start, part.start) - part.start, min(start + length, part.stop) - part.start
            return self._repeated(lambda: self._part_range(entry, part, first, stop))

        wanted = [part for part in entry.objects if max(start, part.start) < min(start + length, part.stop)]
        with _threads(self.options.connections) as pool:
            return b"".join(pool.map(read, wanted))

    def problems(self, entries: Iterable[FileEntry], *, read: bool = False) -> list[str]:
        """What is wrong with the objects of these files."""
        parts = {part.sha256: (entry, part) for entry in entries for part in entry.objects}
        with _threads(self.options.connections) as pool:
            results = pool.map(lambda pair: self._problem(pair[0], pair[1], read), parts.values())
            return [problem for problem in results if problem]

    def write(self, key: str, content: bytes) -> None:
        """Store a small object, unless it exists. Of two writers at once the first one's stays, if the server can tell.

        Where it cannot, because it refuses or ignores conditions, the last one's stays: both are whole, and both name
        objects that are there.
        """
        for _ in range(self.options.attempts):
            if self.size(key) is not None:
                return
            with explained_failures(self.address, bool(self.options.kms_key)):
                try:
                    return self._put(key, content, IfNoneMatch="*")
                except ClientError as failure:
                    if status_of(failure) == 412:
                        return None  # The object exists.
                    if lacks_feature(failure) or status_of(failure) == 400:
                        return self._put(key, content)  # The server knows no conditions.
                    if status_of(failure) != 409:
                        raise
            time.sleep(self.options.retry_delay_s)  # Another writer of this key has begun, and may yet fail.
        raise StageError(f"writes of {key} to {self.address} were in conflict with others again and again; run again")

    def put_files(self, files: Mapping[str, Path], *, move: bool) -> tuple[FileEntry, ...]:
        """Store files as objects. A moved file goes into the cache, where the next stage finds it."""
        size_bytes = sum(path.stat().st_size for path in files.values())
        with count_bytes(size_bytes, f"to {self.address}") as moved, _threads(self.options.connections) as pool:
            sender = Sender(pool, self.options, partial(self._put_part, moved))
            sent = [sender.send(name, path) for name, path in files.items()]
            entries = tuple(file.entry() for file in sent)
        if move:
            for entry in entries:
                self.cache.keep(files[entry.path], entry)
        return entries

    def local_files(self, entries: Iterable[FileEntry], *, verify: bool = False) -> dict[str, Path]:
        """Paths of local files with the content of these entries; a damaged file in the cache is fetched again."""
        wanted = list({entry.sha256: entry for entry in entries}.values())
        with _threads(self.options.connections) as pool:
            list(pool.map(lambda entry: self.cache.drop_damaged(entry, verify=verify), wanted))
        if self.cache.missing(wanted):
            with self.cache.writing():
                self._fetch(self.cache.missing(wanted))
        return {entry.sha256: self.cache.path(entry) for entry in wanted}

    def items(self, prefix: str) -> Iterator[Item]:
        """All objects whose keys start with ``prefix``."""
        with explained_failures(self.address):
            for page in self._pages(self._full(prefix)):
                if "Name" not in page and "IsTruncated" not in page:
                    raise odd_answer(self.address, "a list of objects was expected")
                for entry in page.get("Contents", []):
                    key = entry["Key"].removeprefix(self._full(""))
                    yield Item(key, entry["Size"], entry["LastModified"].timestamp())

    def leftovers(self) -> Iterator[Item]:
        """Nothing: the parts that an interrupted writer has sent are objects of no manifest."""
        return iter(())

    def delete(self, item: Item) -> None:
        """Remove an object or a leftover."""
        with explained_failures(self.address):
            self.client.delete_object(**self._location(item.key))

    def _pages(self, prefix: str, **limits: int) -> Iterator[dict[str, Any]]:
        """The pages of a list of objects, in the second form or, where the server has only that, in the first."""
        asked = {"Bucket": self.bucket, "Prefix": prefix, **limits}
        try:
            first = self.client.list_objects_v2(**asked)
            if not first.get("IsTruncated"):
                yield first
                return
            if first.get("NextContinuationToken"):
                yield first
                more = self.client.get_paginator("list_objects_v2")
                yield from more.paginate(**asked, ContinuationToken=first["NextContinuationToken"])
                return
        except ClientError as failure:
            if not (lacks_feature(failure) or status_of(failure) == 400):
                raise
        yield from self.client.get_paginator("list_objects").paginate(**asked)

    def _found(self, prefix: str) -> Item | None:
        """The first object whose key begins so; a key comes before all that it is the beginning of."""
        return next(self.items(prefix), None)

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _location(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self._full(key)}

    def _put(self, key: str, content: bytes, **condition: str) -> None:
        """Botocore signs the SHA-256 of the content, so that the server refuses other bytes than were sent."""
        # A file object is sent in small pieces, and the time limit holds for each of them, not for the whole.
        body = io.BytesIO(content)
        answer = self.client.put_object(Body=body, **self._location(key), **self.options.encryption, **condition)
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        if "etag" not in headers and headers.get("content-type", "").startswith("text/html"):
            raise odd_answer(self.address, "a page after a put")

    def _put_part(self, moved: Callable[[int], None], part: bytes) -> str:
        sha256 = hashlib.sha256(part).hexdigest()
        if self.size(object_key(sha256)) != len(part):
            with explained_failures(self.address, bool(self.options.kms_key)):
                self._put(object_key(sha256), part)
        moved(len(part))
        return sha256

    def _fetch(self, entries: list[FileEntry]) -> None:
        """Fetch the parts that the cache lacks, and finish each file once its digest is verified."""
        self.cache.begin(entries)
        size_bytes = sum(entry.size_bytes for entry in entries)
        with count_bytes(size_bytes, f"from {self.address}") as moved, _threads(self.options.connections) as pool:
            parts = [(entry, part) for entry in entries for part in entry.objects]
            fetched = pool.map(lambda one: self._fetch_part(one[0], one[1], moved), parts)
            for entry in entries:
                whole = hashlib.sha256()
                for part in entry.objects:
                    next(fetched)
                    if entry.parts:
                        self.cache.add_to_digest(whole, entry, part)
                if entry.parts and whole.hexdigest() != entry.sha256:
                    raise ArtifactError(describe_problem(entry, entry.sha256, self.address, "differs from its parts"))
                self.cache.finish(entry)

    def _fetch_part(self, entry: FileEntry, part: StoredObject, moved: Callable[[int], None]) -> None:
        if not self.cache.has_part(entry, part):
            with self.cache.partial(entry).open("r+b") as file:
                self._read_part(entry, part, lambda: file.seek(part.start), file.write)
        moved(part.size_bytes)

    def _problem(self, entry: FileEntry, part: StoredObject, read: bool) -> str | None:
        problem = problem_of_size(self.size(object_key(part.sha256)), part.size_bytes)
        if problem:
            return describe_problem(entry, part.sha256, self.address, problem)
        try:
            if read:
                self._read_part(entry, part)
        except _DamagedError as damaged:
            return str(damaged)
        return None

    def _read_part(
        self,
        entry: FileEntry,
        part: StoredObject,
        begin: Callable[[], object] = lambda: None,
        take: Callable[[bytes], object] = len,
    ) -> None:
        """Read a part and compare its digest; ``begin`` is called before each attempt, ``take`` gets the content."""

        def read() -> None:
            begin()
            digest = hashlib.sha256()
            for chunk in self._part_chunks(entry, part):
                digest.update(chunk)
                take(chunk)
            if digest.hexdigest() != part.sha256:
                raise _DamagedError(describe_problem(entry, part.sha256, self.address, OTHER_CONTENT))

        self._repeated(read)

    def _part_chunks(self, entry: FileEntry, part: StoredObject) -> Iterator[bytes]:
        return self._chunks(object_key(part.sha256), self._missing(entry, part))

    def _part_range(self, entry: FileEntry, part: StoredObject, first: int, stop: int) -> bytes:
        """Some bytes of a part, cut out of the whole where the server gives no ranges."""
        try:
            answer = self._get(object_key(part.sha256), self._missing(entry, part), Range=f"bytes={first}-{stop - 1}")
        except ClientError as failure:
            if not (lacks_feature(failure) or status_of(failure) == 400):
                raise
            return b"".join(self._part_chunks(entry, part))[first:stop]
        with closing(answer["Body"]) as body:
            content = b"".join(body.iter_chunks(_CHUNK_BYTES))
        return content if answer.get("ContentRange") else content[first:stop]

    def _missing(self, entry: FileEntry, part: StoredObject) -> Exception:
        return ArtifactError(describe_problem(entry, part.sha256, self.address, "is missing"))

    def _chunks(self, key: str, missing: Exception) -> Iterator[bytes]:
        """The content of an object; raises ``missing`` if there is none."""
        with closing(self._get(key, missing)["Body"]) as body:
            yield from body.iter_chunks(_CHUNK_BYTES)

    def _get(self, key: str, missing: Exception, **limits: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self.client.get_object(**self._location(key), **limits)
            return answer
        except ClientError as failure:
            if error_code(failure) == "NoSuchKey":
                raise missing from failure
            raise

    def _repeated(self, action: Callable[[], Result]) -> Result:
        """Repeat an action whose answer breaks off or is damaged; botocore repeats only requests."""
        with explained_failures(self.address):
            for attempt in range(self.options.attempts - 1):
                try:
                    return action()
                except (HTTPClientError, IncompleteReadError, _DamagedError):
                    time.sleep(min(_LONGEST_DELAY_S, self.options.retry_delay_s * 2**attempt))
            return action()


class _DamagedError(ArtifactError):
    """An object arrived with another content than its digest says; the transfer may have damaged it."""


@contextmanager
def _threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; work that has not begun is cancelled when the block ends."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def connect(options: S3Options) -> Any:
    """A client for any S3 server; it sends no checksums beside the signature, which not all servers support."""
    variables, session = site_variables(os.environ), botocore.session.get_session()
    check_files(variables)
    proxy = proxy_for(options.endpoint_url) if options.endpoint_url else None
    config = Config(
        connect_timeout=min(10.0, options.timeout_s),
        read_timeout=options.timeout_s,
        max_pool_connections=2 * options.connections,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        client_cert=variables.get(CLIENT_CERTIFICATE) or None,
        proxies={"http": proxy, "https": proxy} if proxy else {} if options.endpoint_url else None,
        s3={"addressing_style": {True: "path", False: "virtual", None: "auto"}[options.path_style]},
    )
    try:
        client = boto3.session.Session(botocore_session=session).client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=options.region,
            config=config,
            verify=session.get_config_variable("ca_bundle") or variables.get("SSL_CERT_FILE"),
        )
    except ValueError as invalid:
        raise ConfigError(f"the S3 endpoint cannot be used: {invalid}; correct AWS_ENDPOINT_URL_S3") from invalid
    for operation in ("ListObjects", "ListObjectsV2"):  # our keys need no encoding, and not all servers know it
        client.meta.events.unregister(f"before-parameter-build.s3.{operation}", set_list_objects_encoding_type_url)
    return client

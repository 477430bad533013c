"""A root in an S3 bucket, or on any server that speaks S3's protocol.

Content goes straight between the bucket and local files; what was fetched stays in a cache directory under its key.
Finding out whether a key exists needs the right to list the bucket.
"""

import base64
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from moesaic.errors import ConfigError, StageError
from moesaic.progress import count_bytes
from moesaic.store.lanes import Lanes
from moesaic.store.root import Item, file_digest, object_key
from moesaic.store.s3_download import Reader, check_space
from moesaic.store.s3_errors import error_code, explained_failures, missing_bucket, status_of
from moesaic.store.s3_options import S3Options, split_address
from moesaic.store.s3_upload import Source, Upload, UploadLostError

_UPLOAD_ROUNDS = 3
"""How often an upload starts again because somebody else ended it."""


class S3Root:
    """Objects of one bucket under one prefix; see :class:`moesaic.store.Root` for the operations."""

    def __init__(self, address: str, cache: Path, options: S3Options) -> None:
        """Connect to ``s3://bucket/prefix``; fetched objects go to ``cache``.

        Raises:
            ConfigError: if the address, the bucket or the credentials cannot be used.
            StageError: if the server cannot be reached.
        """
        self.bucket, self._prefix = split_address(address)
        self.cache, self.options = cache, options
        self._address = address
        with explained_failures(address):
            self.client = connect(options)
            self._check_bucket()
        self._reader = Reader(self.client, self.bucket, options)

    @property
    def address(self) -> str:
        """See :class:`Root`."""
        return self._address

    def size(self, key: str) -> int | None:
        """See :class:`Root`."""
        with explained_failures(self.address):
            try:
                return int(self.client.head_object(Bucket=self.bucket, Key=self._full(key))["ContentLength"])
            except ClientError as failure:
                if status_of(failure) == 404:
                    return None
                raise

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """See :class:`Root`."""
        with Lanes(self.options.connections) as lanes:
            return lanes.each(self.size, keys)

    def read(self, key: str) -> bytes:
        """See :class:`Root`."""
        with explained_failures(self.address):
            return self._reader.read(self._full(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`Root`."""
        cached = self.cache / key
        if cached.exists():
            with cached.open("rb") as file:
                file.seek(start)
                return file.read(length)
        found = bytearray()
        with explained_failures(self.address):
            try:
                self._reader.stream(self._full(key), start, start + length, found.extend)
            except ClientError as failure:
                if error_code(failure) == "NoSuchKey":
                    raise FileNotFoundError(key) from failure
                raise
        return bytes(found)

    def digest(self, key: str) -> str:
        """See :class:`Root`."""
        digest = hashlib.sha256()
        size_bytes = self.size(key)
        if size_bytes is None:
            raise FileNotFoundError(key)
        with explained_failures(self.address):
            self._reader.stream(self._full(key), 0, size_bytes, digest.update)
        return digest.hexdigest()

    def write(self, key: str, content: bytes) -> None:
        """See :class:`Root`; of two writers at once the first one's content stays."""
        for _ in range(self.options.attempts):
            if self._put_new(key, content) or self.size(key) is not None:
                return
            time.sleep(self.options.retry_delay_s)  # Another writer of this key has begun, and may yet fail.
        raise StageError(f"writes of {key} to {self.address} were in conflict with others again and again; run again")

    def put_files(self, sources: Sequence[Path], *, move: bool) -> list[str]:
        """See :class:`Root`; a moved file goes on into the cache, where the next stage finds it."""
        with self._lanes("to", sum(source.stat().st_size for source in sources)) as lanes:
            return lanes.each(lambda source: self._put_file(source, move, lanes), sources)

    def local_files(self, sizes: Mapping[str, int], *, verify: bool = False) -> dict[str, Path]:
        """See :class:`Root`; a damaged file in the cache is fetched again.

        Nobody waits until the cache's disk has taken what was fetched, so all is checked again once the machine has
        been started anew: its power may have failed.
        """
        files = {sha256: self.cache / object_key(sha256) for sha256 in sizes}
        missing = [sha256 for sha256, file in files.items() if not file.exists()]
        doubtful = [sha256 for sha256, file in files.items() if file.exists() and (verify or _is_older_than_boot(file))]
        check_space(self.cache, {files[sha256]: sizes[sha256] for sha256 in missing})
        with self._lanes("from", sum(sizes[sha256] for sha256 in missing)) as lanes:
            lanes.each(lambda sha256: _drop_if_damaged(files[sha256], sha256), doubtful)
            wanted = [sha256 for sha256, file in files.items() if not file.exists()]
            lanes.each(lambda sha256: self._fetch(sha256, sizes[sha256], lanes), wanted)
        return files

    def items(self, prefix: str) -> Iterator[Item]:
        """See :class:`Root`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._full(prefix))
        with explained_failures(self.address):
            for page in pages:
                for found in page.get("Contents", []):
                    key = found["Key"].removeprefix(self._full(""))
                    yield Item(key, found["Size"], found["LastModified"].timestamp())

    def leftovers(self) -> Iterator[Item]:
        """See :class:`Root`: uploads in progress, as old as the part that arrived last."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=self._full("objects/")
        )
        with explained_failures(self.address):
            for page in pages:
                for upload in page.get("Uploads", []):
                    yield self._unfinished(upload)

    def delete(self, item: Item) -> None:
        """See :class:`Root`."""
        place = {"Bucket": self.bucket, "Key": self._full(item.key)}
        with explained_failures(self.address):
            if item.upload_id is None:
                self.client.delete_object(**place)
                return
            try:
                self.client.abort_multipart_upload(UploadId=item.upload_id, **place)
            except ClientError as failure:
                if error_code(failure) != "NoSuchUpload":
                    raise

    @contextmanager
    def _lanes(self, way: str, size_bytes: int) -> Iterator[Lanes]:
        with (
            count_bytes(size_bytes, f"{way} {self.address}") as moved,
            Lanes(self.options.connections, moved) as lanes,
        ):
            yield lanes

    def _put_file(self, path: Path, move: bool, lanes: Lanes) -> str:
        with lanes.hashing:
            source = Source.measure(path, self.options.part_bytes)
        key = object_key(source.sha256)
        with lanes.turn(key):
            if self.size(key) == source.size_bytes:
                lanes.moved(source.size_bytes)
                return source.sha256
            self._upload(key, source, lanes)
        if move:
            self._keep(path, self.cache / key)
        return source.sha256

    def _upload(self, key: str, source: Source, lanes: Lanes) -> None:
        upload = Upload(self.client, self.bucket, self._full(key), source, self.options, lanes)
        for _ in range(_UPLOAD_ROUNDS):
            try:
                with explained_failures(self.address):
                    upload.run()
                return
            except UploadLostError:
                if self.size(key) == source.size_bytes:
                    return
        raise StageError(f"uploads of {key} to {self.address} were ended by others again and again; run again")

    def _fetch(self, sha256: str, size_bytes: int, lanes: Lanes) -> None:
        key = object_key(sha256)
        with explained_failures(self.address):
            self._reader.fetch(self._full(key), size_bytes, sha256, self.cache / key, self.address, lanes)

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _check_bucket(self) -> None:
        try:
            self.client.head_bucket(Bucket=self.bucket)
        except ClientError as failure:
            if status_of(failure) == 404:
                raise missing_bucket(self.address) from failure
            raise

    def _put_new(self, key: str, content: bytes) -> bool:
        """Whether the object was made; False if there is or may soon be one."""
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
        with explained_failures(self.address):
            try:
                self.client.put_object(
                    Bucket=self.bucket,
                    Key=self._full(key),
                    Body=content,
                    ChecksumSHA256=checksum,
                    IfNoneMatch="*",
                    **self.options.encryption,
                )
            except ClientError as failure:
                if status_of(failure) not in (409, 412):
                    raise
                return False
        return True

    def _unfinished(self, upload: Any) -> Item:
        pages = self.client.get_paginator("list_parts").paginate(
            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
        parts = [part for page in pages for part in page.get("Parts", [])]
        touched = max((part["LastModified"] for part in parts), default=upload["Initiated"])
        key = upload["Key"].removeprefix(self._full(""))
        return Item(key, sum(part["Size"] for part in parts), touched.timestamp(), upload["UploadId"])

    def _keep(self, source: Path, cached: Path) -> None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        source.chmod(0o444)
        try:
            source.replace(cached)
        except OSError:  # On another disk: not worth a copy.
            source.unlink()


def _is_older_than_boot(file: Path) -> bool:
    return file.stat().st_ctime < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _drop_if_damaged(file: Path, sha256: str) -> None:
    if file_digest(file) == sha256:
        os.utime(file)  # Younger than the boot now.
    else:
        file.unlink()


def connect(options: S3Options) -> Any:
    """A client that leaves checksums to us: SHA-256 on everything stored, and checked on everything fetched."""
    config = Config(
        connect_timeout=min(10.0, options.timeout_s),
        read_timeout=options.timeout_s,
        max_pool_connections=2 * options.connections,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            "addressing_style": {True: "path", False: "virtual", None: "auto"}[options.path_style],
            # The checksum of what is stored is signed already; signing the body too would hash it once more.
            "payload_signing_enabled": False,
        },
    )
    try:
        return boto3.session.Session().client(
            "s3", endpoint_url=options.endpoint_url, region_name=options.region, config=config
        )
    except ValueError as invalid:
        raise ConfigError(f"the S3 endpoint cannot be used: {invalid}; correct AWS_ENDPOINT_URL_S3") from invalid

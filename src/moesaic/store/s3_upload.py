"""Store a file as an S3 object, in parts that are sent at once and need not be sent again after an interruption.

The file is read once for its digest, which is its name in the store, and those of its parts; then again part by part.
S3 checks each part against its digest as it arrives, and a file that was written to meanwhile is refused, so no other
content ever becomes visible.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from botocore.exceptions import ClientError, HTTPClientError

from moesaic.errors import ArtifactError
from moesaic.store.lanes import Lanes
from moesaic.store.root import changed_while_added, file_digest
from moesaic.store.s3_errors import CORRUPTED, error_code
from moesaic.store.s3_options import S3Options

PARTS = ".parts"
"""Ending of the key beside an object of several parts: their size and digests, for whoever reads it."""
_MAX_PARTS = 10_000
_CHUNK_BYTES = 2**18
_LOST = ("NoSuchUpload", "InvalidPart")
"""The second: another writer has sent a part anew after this one learned its tag."""


class UploadLostError(Exception):
    """The upload in progress is not what it was: another writer completed or changed it, or it was cleaned up."""


class Window:
    """A stretch of a file as a body to send; botocore's time limits hold for each piece that is read from it.

    Pieces are larger than botocore asks for, and lie in the same memory one after the other.
    """

    def __init__(self, file: io.FileIO | io.BytesIO, start: int, num_bytes: int) -> None:
        self._file, self._start, self._num_bytes = file, start, num_bytes
        self._room = memoryview(bytearray(min(_CHUNK_BYTES, num_bytes)))
        self.seek(0)

    def __len__(self) -> int:
        """Of the whole."""
        return self._num_bytes

    def read(self, at_least: int = -1) -> memoryview:
        """The next piece, valid until the one after it is read; EOFError if the file ends before the window does."""
        left = self._num_bytes - self.tell()
        num_bytes = self._file.readinto(self._room[:left])
        if not num_bytes and left:
            raise EOFError(f"{left} bytes are missing")
        return self._room[:num_bytes]

    def tell(self) -> int:
        """How much has been read."""
        return self._file.tell() - self._start

    def __enter__(self) -> Self:
        """The window itself."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close the file."""
        self._file.close()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in files."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._num_bytes}[whence]
        return self._file.seek(self._start + base + offset) - self._start


@dataclass(frozen=True)
class Source:
    """A file and the digests of its content."""

    path: Path
    size_bytes: int
    sha256: str
    part_bytes: int
    """Size of all parts but the last."""
    parts: tuple[bytes, ...]
    """SHA-256 of each."""
    modified_ns: int
    """When it was last written to before it was read."""

    @classmethod
    def measure(cls, path: Path, part_bytes: int) -> Self:
        """Read the file once; parts get larger where there would be too many of them."""
        found = path.stat()
        size_bytes = found.st_size
        part_bytes = max(part_bytes, -(-size_bytes // _MAX_PARTS))
        if size_bytes <= part_bytes:
            sha256 = file_digest(path)
            return cls(path, size_bytes, sha256, part_bytes, (bytes.fromhex(sha256),), found.st_mtime_ns)
        whole, parts, chunk = hashlib.sha256(), [], memoryview(bytearray(min(part_bytes, _CHUNK_BYTES)))
        with path.open("rb", buffering=0) as file:
            for start in range(0, size_bytes, part_bytes):
                part, left = hashlib.sha256(), min(part_bytes, size_bytes - start)
                while num_bytes := file.readinto(chunk[: min(left, len(chunk))]):
                    whole.update(chunk[:num_bytes])
                    part.update(chunk[:num_bytes])
                    left -= num_bytes
                parts.append(part.digest())
        return cls(path, size_bytes, whole.hexdigest(), part_bytes, tuple(parts), found.st_mtime_ns)

    def size_of(self, number: int) -> int:
        """Bytes of a part; parts count from 1, as in S3."""
        return min(self.part_bytes, self.size_bytes - (number - 1) * self.part_bytes)

    def window(self, number: int) -> "Window":
        """A part as a body; close it."""
        return Window(io.FileIO(self.path), (number - 1) * self.part_bytes, self.size_of(number))

    def check_part(self, number: int) -> None:
        """Read a part again and raise an ArtifactError unless it is what it was."""
        if self.digest_part(number, "sha256") != self.parts[number - 1]:
            raise changed_while_added(self.path)

    def digest_part(self, number: int, algorithm: str) -> bytes:
        """Read a part again."""
        digest = hashlib.new(algorithm, usedforsecurity=False)
        with self.window(number) as window:
            while piece := window.read():
                digest.update(piece)
        return digest.digest()

    def check_untouched(self) -> None:
        """Raise an ArtifactError if somebody has written to the file since it was measured."""
        found = self.path.stat()
        if (found.st_size, found.st_mtime_ns) != (self.size_bytes, self.modified_ns):
            raise changed_while_added(self.path)


@dataclass(frozen=True)
class Upload:
    """What to store where."""

    client: Any
    bucket: str
    key: str
    source: Source
    options: S3Options
    lanes: Lanes

    def run(self) -> None:
        """Send what is missing and complete the object.

        Raises:
            ArtifactError: if the file has another content by now.
            UploadLostError: see there; the object may be complete.
        """
        if len(self.source.parts) == 1:
            self.lanes.parts(self._put_whole, [1])
            return
        try:
            self._put_parts()
        except ClientError as failure:
            if error_code(failure) in _LOST:
                raise UploadLostError(self.key) from failure
            raise

    def _put_whole(self, number: int) -> None:
        """Objects of one part are visible at once, so what is sent is checked here whatever the server does."""
        content, checksum = self.source.path.read_bytes(), self.source.parts[0]
        if hashlib.sha256(content).digest() != checksum:
            raise changed_while_added(self.source.path)
        body = Window(io.BytesIO(content), 0, len(content))
        self.client.put_object(Body=body, ChecksumSHA256=_base64(checksum), **self._place, **self.options.encryption)
        self.lanes.moved(len(content))

    def _put_parts(self) -> None:
        upload_id, kept = self._unfinished() or (self._begin(), {})

        def send(number: int) -> dict[str, Any]:
            checksum = _base64(self.source.parts[number - 1])
            etag = self._etag_of_equal(number, kept.get(number), checksum)
            if etag is None:
                etag = self._send_part(upload_id, number, checksum)
            self.lanes.moved(self.source.size_of(number))
            return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum}

        try:
            sent = self.lanes.parts(send, range(1, len(self.source.parts) + 1))
            self.source.check_untouched()
        except ArtifactError:  # Of no use to anybody any more.
            self.client.abort_multipart_upload(UploadId=upload_id, **self._place)
            raise
        self._write_digests()
        self.client.complete_multipart_upload(UploadId=upload_id, MultipartUpload={"Parts": sent}, **self._place)

    def _send_part(self, upload_id: str, number: int, checksum: str) -> str:
        """Send a part, again if it arrives damaged, and return its tag. Botocore itself repeats what breaks off."""
        place = self._place | {"UploadId": upload_id, "PartNumber": number, "ChecksumSHA256": checksum}
        for attempt in range(1, self.options.attempts + 1):
            try:
                with self.source.window(number) as body:
                    return str(self.client.upload_part(Body=body, **place)["ETag"])
            except HTTPClientError:
                self.source.check_untouched()
                raise
            except ClientError as failure:
                if error_code(failure) not in CORRUPTED:
                    raise
                self.source.check_part(number)
                if attempt == self.options.attempts:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _etag_of_equal(self, number: int, kept: Mapping[str, Any] | None, checksum: str) -> str | None:
        """The tag of a part that the server has already, if it is known to be equal.

        S3 lists the SHA-256 of each part. Servers that do not may still give the MD5 as the tag, unless they encrypt.
        """
        if kept is None or kept["Size"] != self.source.size_of(number):
            return None
        etag = str(kept["ETag"])
        if listed := kept.get("ChecksumSHA256"):
            return etag if listed == checksum else None
        return etag if etag.strip('"') == self.source.digest_part(number, "md5").hex() else None

    def _begin(self) -> str:
        answer = self.client.create_multipart_upload(
            ChecksumAlgorithm="SHA256",
            Metadata={"sha256": self.source.sha256},
            **self._place,
            **self.options.encryption,
        )
        return str(answer["UploadId"])

    def _unfinished(self) -> tuple[str, Mapping[int, Mapping[str, Any]]] | None:
        """The upload in progress that holds the most parts of this very size, and its parts by number."""
        found = []
        for page in self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.key):
            for upload in page.get("Uploads", []):
                if upload["Key"] == self.key:
                    found.append((upload["UploadId"], self._parts_of(upload["UploadId"])))
        last = len(self.source.parts)
        usable = [
            (upload_id, parts)
            for upload_id, parts in found
            if parts and all(part["Size"] == self.source.part_bytes or number == last for number, part in parts.items())
        ]
        return max(usable, key=lambda one: len(one[1]), default=None)

    def _parts_of(self, upload_id: str) -> dict[int, Mapping[str, Any]]:
        pages = self.client.get_paginator("list_parts").paginate(UploadId=upload_id, **self._place)
        try:
            return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
        except ClientError as failure:
            if error_code(failure) == "NoSuchUpload":
                return {}
            raise

    def _write_digests(self) -> None:
        digests = [digest.hex() for digest in self.source.parts]
        content = json.dumps({"part_bytes": self.source.part_bytes, "sha256": digests}, indent=1).encode() + b"\n"
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.key + PARTS,
            Body=content,
            ChecksumSHA256=_base64(hashlib.sha256(content).digest()),
            **self.options.encryption,
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self.key}


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()

"""Store a file as an S3 object, in parts that are sent at once and need not be sent again after an interruption.

Every part carries its SHA-256, which S3 checks before it takes the part. The digest of the whole is computed from the
very bytes that are sent and checked before the parts are put together, so that no other content ever becomes visible.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from moesaic.store.bounded import run_bounded
from moesaic.store.root import changed_while_added
from moesaic.store.s3_errors import CORRUPTED, error_code
from moesaic.store.s3_options import S3Options

PARTS = ".parts"
"""Ending of the key beside an object of several parts: their size and digests, for whoever reads it."""
_MAX_PARTS = 10_000
_LOST = ("NoSuchUpload", "InvalidPart")
"""The second: another writer has sent a part anew after this one learned its tag."""


class UploadLostError(Exception):
    """The upload in progress is not what it was: another writer completed or changed it, or it was cleaned up."""


@dataclass(frozen=True)
class Upload:
    """What to store where."""

    client: Any
    bucket: str
    key: str
    source: Path
    sha256: str
    options: S3Options

    def run(self) -> None:
        """Send what is missing and complete the object.

        Raises:
            ArtifactError: if the file has another digest by now.
            UploadLostError: see there; the object may be complete.
        """
        size_bytes = self.source.stat().st_size
        if size_bytes <= self.options.part_bytes:
            self._put_whole()
            return
        part_bytes = max(self.options.part_bytes, -(-size_bytes // _MAX_PARTS))
        try:
            self._put_parts(part_bytes, size_bytes)
        except ClientError as failure:
            if error_code(failure) in _LOST:
                raise UploadLostError(self.key) from failure
            raise

    def _put_whole(self) -> None:
        content = self.source.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise changed_while_added(self.source)
        self.client.put_object(
            Body=content, ChecksumSHA256=_base64(bytes.fromhex(self.sha256)), **self._place, **self.options.encryption
        )

    def _put_parts(self, part_bytes: int, size_bytes: int) -> None:
        upload_id, kept = self._unfinished(part_bytes, size_bytes) or (self._begin(), {})
        whole = hashlib.sha256()

        def parts(hasher: ThreadPoolExecutor) -> Iterator[tuple[int, bytes]]:
            with self.source.open("rb") as file:
                number, hashed = 0, None
                while content := file.read(part_bytes):
                    number += 1
                    if hashed:
                        hashed.result()  # Not more than one part waits for the digest of the whole.
                    hashed = hasher.submit(whole.update, content)
                    yield number, content

        def send(part: tuple[int, bytes]) -> dict[str, Any]:
            number, content = part
            checksum = _base64(hashlib.sha256(content).digest())
            etag = _etag_of_equal(kept.get(number), content, checksum)
            if etag is None:
                etag = self._send_part(upload_id, number, content, checksum)
            return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum}

        with ThreadPoolExecutor(1) as hasher:
            sent = run_bounded(send, parts(hasher), self.options.connections)
        if whole.hexdigest() != self.sha256:
            self.client.abort_multipart_upload(UploadId=upload_id, **self._place)
            raise changed_while_added(self.source)
        self._write_digests(part_bytes, [part["ChecksumSHA256"] for part in sent])
        self.client.complete_multipart_upload(UploadId=upload_id, MultipartUpload={"Parts": sent}, **self._place)

    def _send_part(self, upload_id: str, number: int, content: bytes, checksum: str) -> str:
        """Send a part, again if it arrives damaged, and return its tag. Botocore itself repeats what breaks off."""
        for attempt in range(1, self.options.attempts + 1):
            try:
                answer = self.client.upload_part(
                    UploadId=upload_id, PartNumber=number, Body=content, ChecksumSHA256=checksum, **self._place
                )
                return str(answer["ETag"])
            except ClientError as failure:
                if error_code(failure) not in CORRUPTED or attempt == self.options.attempts:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _begin(self) -> str:
        answer = self.client.create_multipart_upload(
            ChecksumAlgorithm="SHA256", Metadata={"sha256": self.sha256}, **self._place, **self.options.encryption
        )
        return str(answer["UploadId"])

    def _unfinished(self, part_bytes: int, size_bytes: int) -> tuple[str, Mapping[int, Mapping[str, Any]]] | None:
        """The upload in progress that holds the most parts of this very size, and its parts by number."""
        found = []
        for page in self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.key):
            for upload in page.get("Uploads", []):
                if upload["Key"] == self.key:
                    found.append((upload["UploadId"], self._parts_of(upload["UploadId"])))
        last = -(-size_bytes // part_bytes)
        usable = [
            (upload_id, parts)
            for upload_id, parts in found
            if parts and all(part["Size"] == part_bytes or number == last for number, part in parts.items())
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

    def _write_digests(self, part_bytes: int, checksums: list[str]) -> None:
        digests = [base64.b64decode(checksum).hex() for checksum in checksums]
        content = json.dumps({"part_bytes": part_bytes, "sha256": digests}, indent=1).encode() + b"\n"
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.key + PARTS,
            Body=content,
            ChecksumSHA256=_base64(hashlib.sha256(content).digest()),
            **self.options.encryption,
        )

    @property
    def _place(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key}


def _etag_of_equal(kept: Mapping[str, Any] | None, content: bytes, checksum: str) -> str | None:
    """The tag of a part that the server has already, if it is known to be equal.

    S3 lists the SHA-256 of each part. Servers that do not may still give the MD5 as the tag, unless they encrypt.
    """
    if kept is None or kept["Size"] != len(content):
        return None
    etag = str(kept["ETag"])
    listed = kept.get("ChecksumSHA256")
    equal = listed == checksum if listed else etag.strip('"') == hashlib.md5(content, usedforsecurity=False).hexdigest()
    return etag if equal else None


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()

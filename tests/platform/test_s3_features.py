"""Servers that speak less of S3 than AWS: everything works without a feature, or one line says which is missing."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ConfigError, MoesaicError
from moesaic.platform.store import Manifest, S3Options, Store
from moesaic.platform.store.s3 import S3Root
from moesaic.platform.store.upkeep import delete, find_garbage

from .conftest import PART_BYTES
from .faulty_proxy import Fault, FaultyProxy, Kind, Request
from .test_s3_store import add, assert_same, entry_of

ALWAYS = 10**6


def has(*headers: str) -> Callable[[Request], bool]:
    return lambda one: any(name.startswith(header) for name in one.headers for header in headers)


def asks(text: str, *methods: str) -> Callable[[Request], bool]:
    return lambda one: text in one.path and one.method in (methods or ("GET", "PUT", "POST", "HEAD", "DELETE"))


def is_bucket_head(one: Request) -> bool:
    return one.method == "HEAD" and "/team/" not in one.path


@dataclass(frozen=True)
class Lacking:
    """A feature that is used where it is there, and requests that use it."""

    uses: Callable[[Request], bool]
    ignored: str = ""
    """The header that the server ignores, instead of refusing it."""


FEATURES = {
    "conditional puts": Lacking(has("if-none-match")),
    "conditional puts, ignored": Lacking(has("if-none-match"), "if-none-match"),
    "HEAD": Lacking(lambda one: one.method == "HEAD"),
    "the second form of listing": Lacking(asks("list-type=2")),
    "ranges": Lacking(has("range")),
    "ranges, ignored": Lacking(has("range"), "range"),
}
NEVER_USED = {
    "CRC32": has("x-amz-checksum-crc32"),
    "CRC32C": has("x-amz-checksum-crc32c"),
    "CRC64NVME": has("x-amz-checksum-crc64nvme"),
    "SHA1": has("x-amz-checksum-sha1"),
    "SHA256": has("x-amz-checksum-sha256"),
    "the algorithm of a checksum": has("x-amz-checksum-algorithm", "x-amz-sdk-checksum-algorithm"),
    "the mode of checksums": has("x-amz-checksum-mode"),
    "Content-MD5": has("content-md5"),
    "trailers": has("x-amz-trailer", "x-amz-decoded-content-length"),
    "tags, ACLs, classes": has("x-amz-tagging", "x-amz-acl", "x-amz-grant", "x-amz-storage-class"),
    "listing of uploads": asks("?uploads"),
    "multipart": asks("uploadId"),
    "copies": has("x-amz-copy-source"),
    "HEAD of a bucket": is_bucket_head,
    "location of a bucket": asks("?location"),
    "versions": asks("version"),
    "encoding of listed keys": asks("encoding-type"),
    "deletion of several": asks("?delete"),
}


def use_all(store: Store, elsewhere: Store, model: Path) -> Manifest:
    """What the store does, once; from another machine too."""
    manifest = add(store, model)
    assert add(elsewhere, model) == manifest
    assert [one.id for one in elsewhere.manifests()] == [manifest.id]
    assert not list(store.root.problems(manifest.files, read=True))
    content, entry = (model / "weights.bin").read_bytes(), entry_of(manifest, "weights.bin")
    for start, stop in [(0, 1), (PART_BYTES - 1, 3 * PART_BYTES + 5), (len(content) - 3, len(content))]:
        assert elsewhere.read_range(entry, start, stop - start) == content[start:stop]
    assert_same(elsewhere.materialize(manifest, verify=True), model)
    for item in list(store.root.items("manifests/")):
        store.root.delete(item)
    assert list(store.manifests()) == []
    return manifest


REFUSALS = [(501, "NotImplemented"), (400, "InvalidArgument"), (405, "MethodNotAllowed")]


@pytest.mark.parametrize(
    ("feature", "status"),
    [(name, status) for name, one in FEATURES.items() for status in REFUSALS[: 1 if one.ignored else 3]],
)
def test_all_works_without(
    feature: str,
    status: tuple[int, str],
    address: str,
    options: S3Options,
    model: Path,
    proxy: FaultyProxy,
    tmp_path: Path,
) -> None:
    lacking = FEATURES[feature]
    kind: Kind = "ignore" if lacking.ignored else "status"
    proxy.faults.append(Fault(kind, lacking.uses, ALWAYS, *status, header=lacking.ignored))
    use_all(Store.at(address, options), another(address, options, tmp_path), model)
    assert proxy.faults[0].times < ALWAYS, "it is used where it is there"


def test_what_is_never_asked_for_may_be_refused(
    address: str, options: S3Options, model: Path, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.faults += [Fault("status", uses, ALWAYS, 501, "NotImplemented") for uses in NEVER_USED.values()]
    use_all(Store.at(address, options), another(address, options, tmp_path), model)
    assert [name for name, uses in NEVER_USED.items() if any(uses(one) for one in proxy.log)] == []


def another(address: str, options: S3Options, tmp_path: Path) -> Store:
    """The store from a machine that has fetched nothing yet."""
    return Store(S3Root(address, tmp_path / "other", options), tmp_path / "other")


@pytest.mark.parametrize("kind", ["status", "ignore"])
def test_writers_at_once_are_safe_without_conditional_puts(
    kind: Kind, store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy
) -> None:
    """Their manifests differ in the parts; none sees the others', and the last one's stays."""
    proxy.faults.append(Fault(kind, has("if-none-match"), ALWAYS, 501, "NotImplemented", header="if-none-match"))
    proxy.faults.append(Fault("status", lambda one: one.method == "HEAD" and "manifests" in one.path, ALWAYS, 404))
    writers = [
        Store.at(store.root.address, replace(store.root.options, part_bytes=size))
        for size in (PART_BYTES, PART_BYTES // 2, PART_BYTES // 4)
    ]
    with ThreadPoolExecutor(len(writers)) as pool:
        manifests = list(pool.map(lambda one: add(one, model), writers))
    proxy.faults.clear()
    delete(elsewhere, find_garbage(elsewhere, 0, time.time() + 60))
    for manifest in manifests:
        assert_same(elsewhere.materialize(manifest, verify=True), model)
        shutil.rmtree(elsewhere.directory)
    assert elsewhere.manifest(manifests[0].id) in manifests


def test_a_list_that_goes_on_without_a_token_is_read_in_its_first_form(store: Store, client: Any, bucket: str) -> None:
    for index in range(5):
        client.put_object(Bucket=bucket, Key=f"team/models/x/{index}", Body=b"1")
    list_objects = store.root.client.list_objects_v2

    def old_server(**asked: Any) -> dict[str, Any]:
        answer: dict[str, Any] = list_objects(**asked, MaxKeys=2)
        answer.pop("NextContinuationToken")
        return answer

    store.root.client.list_objects_v2 = old_server
    assert [item.key for item in store.root.items("x/")] == [f"x/{index}" for index in range(5)]


NEEDED: dict[str, Callable[[Request], bool]] = {
    "ListObjects": lambda one: one.method == "GET" and "prefix" in one.path,
    "PutObject": lambda one: one.method == "PUT",
    "GetObject": lambda one: one.method == "GET" and "/team/" in one.path,
    "DeleteObject": lambda one: one.method == "DELETE",
}


@pytest.mark.parametrize("operation", NEEDED)
def test_what_is_needed_is_named_once(
    operation: str, address: str, options: S3Options, model: Path, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.faults.append(Fault("status", NEEDED[operation], ALWAYS, 501, "NotImplemented"))
    with pytest.raises(
        ConfigError, match=rf"cannot do {operation} \(NotImplemented: injected\); running again will"
    ) as one:
        use_all(Store.at(address, options), another(address, options, tmp_path), model)
    assert "\n" not in str(one.value)


def test_a_server_without_kms_is_told_which_setting_needs_it(store: Store, model: Path, proxy: FaultyProxy) -> None:
    with_key = Store.at(store.root.address, replace(store.root.options, kms_key="alias/models"))
    proxy.faults.append(Fault("status", has("x-amz-server-side-encryption"), ALWAYS, 501, "NotImplemented"))
    with pytest.raises(MoesaicError, match=r"cannot encrypt with a KMS key \(NotImpl.*unset MOESAIC_S3_KMS_KEY"):
        add(with_key, model)

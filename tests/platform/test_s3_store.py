"""The store in an S3 bucket keeps the store's promises, through a real HTTP server and what goes wrong on the way."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.models.checkpoint import Checkpoint
from moesaic.platform.store import FileEntry, Manifest, S3Options, Store
from moesaic.platform.store.manifest import Parts, StoredObject
from moesaic.platform.store.root import object_key
from moesaic.platform.store.s3 import S3Root, connect
from moesaic.platform.store.tensors import read_tensor

from .conftest import PART_BYTES, SECRET, start_server, stop_server
from .faulty_proxy import Fault, FaultyProxy, Kind, Request


def add(store: Store, directory: Path, **changes: Any) -> Manifest:
    return store.add_directory(directory, "model", format="safetensors", producer="test", **changes)


def keys(client: Any, bucket: str) -> list[str]:
    return sorted(item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", []))


def entry_of(manifest: Manifest, name: str) -> FileEntry:
    return next(entry for entry in manifest.files if entry.path == name)


def puts(sha256: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and request.object == sha256


def gets(sha256: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "GET" and request.object == sha256


def is_commit(request: Request) -> bool:
    return request.method == "PUT" and "/manifests/" in request.path


def assert_same(tree: Path, model: Path) -> None:
    for path in model.iterdir():
        assert (tree / path.name).read_bytes() == path.read_bytes()


def replace_options(store: Store, **changes: Any) -> Store:
    return Store.at(store.root.address, replace(store.root.options, **changes))


def test_what_goes_in_comes_out_on_another_machine(
    store: Store, elsewhere: Store, model: Path, parts: list[str], client: Any, bucket: str
) -> None:
    manifest = add(store, model)
    assert_same(elsewhere.materialize(manifest, verify=True), model)
    assert elsewhere.manifest(manifest.id) == manifest
    assert [one.id for one in elsewhere.manifests()] == [manifest.id]
    assert entry_of(manifest, "config.json").parts is None
    assert entry_of(manifest, "weights.bin").parts == Parts(part_bytes=PART_BYTES, sha256=tuple(parts))
    objects = [object_key(sha256) for sha256 in [entry_of(manifest, "config.json").sha256, *parts]]
    assert keys(client, bucket) == sorted(f"team/models/{key}" for key in [*objects, f"manifests/{manifest.id}.json"])


def test_a_model_has_the_same_id_in_a_directory_and_in_a_bucket(store: Store, model: Path, tmp_path: Path) -> None:
    in_directory = add(Store.at(tmp_path / "store"), model)
    assert add(store, model).id == in_directory.id
    assert "parts" not in in_directory.to_json()


def test_a_part_that_is_there_is_not_sent_again(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    """Another version of the file, of which only the fourth part differs."""
    add(store, model)
    with (model / "weights.bin").open("r+b") as file:
        file.seek(3 * PART_BYTES)
        file.write(b"changed")
    proxy.log.clear()
    manifest = add(store, model)
    assert len(proxy.sent()) == 1
    assert proxy.sent()[0] not in parts
    assert_same(elsewhere.materialize(manifest), model)


def test_what_is_there_is_not_sent_again(store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy) -> None:
    manifest = add(store, model)
    proxy.log.clear()
    assert add(elsewhere, model) == manifest
    assert [one for one in proxy.log if one.method in ("PUT", "POST")] == []


def test_files_travel_at_once_and_share_the_connections(
    store: Store, elsewhere: Store, tmp_path: Path, proxy: FaultyProxy
) -> None:
    """One by one, the small files would leave all connections but one idle."""
    many = tmp_path / "many"
    many.mkdir()
    for index in range(4):
        (many / f"small-{index}").write_bytes(os.urandom(1000))
        (many / f"large-{index}").write_bytes(os.urandom(PART_BYTES + 1))
    proxy.faults.append(Fault("slow", lambda one: bool(one.object), times=1000, seconds=0.02))
    manifest = add(store, many)
    assert proxy.most_at_once >= 3
    proxy.most_at_once = 0
    assert_same(elsewhere.materialize(manifest), many)
    assert proxy.most_at_once >= 3


def test_files_of_equal_content_are_sent_and_fetched_once(
    store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy
) -> None:
    shutil.copy(model / "weights.bin", model / "twin.bin")
    manifest = add(store, model)
    assert len(proxy.sent()) == 1 + 6
    proxy.log.clear()
    assert_same(elsewhere.materialize(manifest), model)
    assert len(proxy.fetched()) == 1 + 6


@pytest.mark.parametrize("num_parts", [1, 40])
def test_one_part_that_fails_stops_the_others(num_parts: int, store: Store, tmp_path: Path, proxy: FaultyProxy) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for index in range(30):
        (many / f"{index:02}").write_bytes(os.urandom(1000 + (num_parts - 1) * PART_BYTES))
    proxy.faults.append(Fault("status", lambda one: one.method == "PUT", status=403, code="AccessDenied"))
    with pytest.raises(ConfigError, match="refused the credentials"):
        add(store, many)
    assert len([one for one in proxy.log if one.method == "PUT"]) < 15


def test_moved_files_stay_in_the_cache(store: Store, model: Path, proxy: FaultyProxy) -> None:
    content = (model / "weights.bin").read_bytes()
    manifest = add(store, model, move=True)
    assert list(model.iterdir()) == []
    proxy.log.clear()
    assert (store.materialize(manifest) / "weights.bin").read_bytes() == content
    assert proxy.log == []


def test_an_upload_cut_in_mid_part_goes_on(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    proxy.faults.append(Fault("cut request", puts(parts[2])))
    manifest = add(store, model)
    assert len(proxy.sent()) == 1 + 6
    assert proxy.faults[0].times == 0
    assert_same(elsewhere.materialize(manifest), model)


def test_servers_may_fail_now_and_then(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    proxy.faults += [
        Fault("status", puts(parts[1]), status=500),
        Fault("status", puts(parts[4]), status=503, code="SlowDown"),
        Fault("status", gets(parts[1]), status=500),
    ]
    assert_same(elsewhere.materialize(add(store, model)), model)
    assert [fault.times for fault in proxy.faults] == [0, 0, 0]


def test_a_server_that_always_fails_is_told_and_finished_parts_are_kept(
    store: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    proxy.faults.append(Fault("status", puts(parts[3]), times=100))
    with pytest.raises(StageError, match=r"keeps failing \(InternalError: injected\).*finished parts are kept"):
        add(replace_options(store, connections=1), model)
    assert proxy.sent()[1:] == parts[:3]
    proxy.faults.clear()
    proxy.log.clear()
    add(store, model)
    assert sorted(proxy.sent()) == sorted(parts[3:])


def test_a_slow_answer_is_asked_for_again(
    store: Store, model: Path, parts: list[str], proxy: FaultyProxy, tmp_path: Path
) -> None:
    manifest = add(store, model)
    proxy.faults.append(Fault("slow", gets(parts[2]), seconds=1.5))
    assert_same(replace_options(store, timeout_s=0.5).materialize(manifest), model)
    repeated = [one.object for one in proxy.log if "attempt=2" in one.headers.get("amz-sdk-request", "")]
    assert repeated == [parts[2]]


def test_a_part_may_take_longer_than_a_server_may_stay_silent(store: Store, tmp_path: Path, proxy: FaultyProxy) -> None:
    """More than the system's buffers hold, at 3 MiB/s; on a busy machine the server itself takes a second or two."""
    (tmp_path / "large").write_bytes(bytes(24 * 2**20))
    proxy.faults.append(Fault("slow request", lambda one: one.num_bytes == 24 * 2**20, seconds=8))
    patient = replace_options(store, part_bytes=2**25, timeout_s=5, attempts=1)
    patient.add_file(tmp_path / "large", "dataset", format="x", producer="test")
    assert proxy.faults[0].times == 0


def test_a_part_damaged_on_its_way_up_is_refused_and_told(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    proxy.faults.append(Fault("corrupt request", puts(parts[4])))
    with pytest.raises(StageError, match=r"received other bytes than were sent.*run again: finished parts are kept"):
        add(store, model)
    assert_same(elsewhere.materialize(add(store, model)), model)


@pytest.mark.parametrize("fault", ["corrupt response", "cut response"])
def test_a_part_damaged_on_its_way_down_is_fetched_again_alone(
    fault: Kind, store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    manifest = add(store, model)
    proxy.log.clear()
    proxy.faults.append(Fault(fault, gets(parts[3])))
    assert_same(elsewhere.materialize(manifest), model)
    small = entry_of(manifest, "config.json").sha256
    assert sorted(proxy.fetched()) == sorted([small, *parts, parts[3]])


def test_an_interrupted_download_fetches_only_what_is_missing(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    manifest = add(store, model)
    proxy.log.clear()
    proxy.faults.append(Fault("cut response", gets(parts[2]), times=100))
    with pytest.raises(StageError, match="broke off again and again"):
        elsewhere.materialize(manifest)
    assert not list(elsewhere.directory.glob("trees/*"))
    assert not (elsewhere.directory / object_key(entry_of(manifest, "weights.bin").sha256)).exists()
    proxy.faults.clear()
    fetched = set(proxy.fetched()) - {parts[2]}
    assert parts[0] in fetched
    proxy.log.clear()
    assert_same(elsewhere.materialize(manifest), model)
    assert set(proxy.fetched()) == {parts[2], *parts} - fetched


def test_a_killed_upload_is_resumed_without_sending_finished_parts_again(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy, client: Any, bucket: str
) -> None:
    proxy.faults.append(Fault("hang", puts(parts[3])))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from moesaic.platform.store import S3Options, Store\n"
        "size = int(sys.argv[2])\n"
        "options = S3Options(endpoint_url=sys.argv[1], region='us-east-1', part_bytes=size, connections=1)\n"
        "Store.at(sys.argv[3], options).add_directory(Path(sys.argv[4]), 'model', format='x', producer='x')\n"
    )
    command = [sys.executable, "-c", code, proxy.url, str(PART_BYTES), store.root.address, str(model)]
    writer = subprocess.Popen(command)
    until = time.monotonic() + 30
    while proxy.sent()[1:] != parts[:3] or proxy.faults[0].times:
        assert time.monotonic() < until and writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    assert [key for key in keys(client, bucket) if key.startswith("team/models/manifests/")] == []
    proxy.log.clear()
    manifest = add(store, model)
    assert sorted(proxy.sent()) == sorted(parts[3:])
    assert_same(elsewhere.materialize(manifest, verify=True), model)


def test_a_killed_download_is_resumed_without_fetching_finished_parts_again(
    store: Store, elsewhere: Store, model: Path, parts: list[str], tmp_path: Path, proxy: FaultyProxy
) -> None:
    manifest = add(store, model)
    proxy.log.clear()
    proxy.faults.append(Fault("hang", gets(parts[3])))
    code = (
        "import sys\n"
        "from moesaic.platform.store import S3Options, Store\n"
        "size = int(sys.argv[2])\n"
        "options = S3Options(endpoint_url=sys.argv[1], region='us-east-1', part_bytes=size, connections=1)\n"
        "store = Store.at(sys.argv[3], options)\n"
        "store.materialize(store.manifest(sys.argv[4]))\n"
    )
    command = [sys.executable, "-c", code, proxy.url, str(PART_BYTES), store.root.address, manifest.id]
    reader = subprocess.Popen(command, env=os.environ | {"MOESAIC_CACHE": str(tmp_path / "other-cache")})
    until = time.monotonic() + 30
    while proxy.faults[0].times:
        assert time.monotonic() < until and reader.poll() is None
        time.sleep(0.01)
    reader.send_signal(signal.SIGKILL)
    assert reader.wait() == -signal.SIGKILL
    assert not list(elsewhere.directory.glob("trees/*"))
    assert not (elsewhere.directory / object_key(entry_of(manifest, "weights.bin").sha256)).exists()
    proxy.log.clear()
    assert_same(elsewhere.materialize(manifest), model)
    # A set: the killed reader's last request may be logged late.
    assert set(proxy.fetched()) == set(parts[3:])


@pytest.mark.parametrize("other_part_bytes", [PART_BYTES, PART_BYTES // 2])
def test_writers_at_once_leave_a_readable_store(
    other_part_bytes: int, store: Store, elsewhere: Store, model: Path
) -> None:
    writers = [store, replace_options(store, part_bytes=other_part_bytes)] * 2
    with ThreadPoolExecutor(len(writers)) as pool:
        manifests = list(pool.map(lambda one: add(one, model), writers))
    assert manifests == [elsewhere.manifest(manifests[0].id)] * len(writers)
    assert_same(elsewhere.materialize(manifests[0], verify=True), model)


def test_readers_at_once_share_one_download(store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy) -> None:
    manifest = add(store, model)
    proxy.log.clear()
    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(lambda _: elsewhere.materialize(manifest), range(4)))
    assert len(set(trees)) == 1
    assert_same(trees[0], model)
    assert len(proxy.fetched()) == 1 + 6
    assert [path for path in elsewhere.directory.rglob("*.partial")] == []


def test_a_manifest_is_committed_on_condition_that_there_is_none(store: Store, model: Path, proxy: FaultyProxy) -> None:
    manifest = add(store, model)
    (committed,) = [one for one in proxy.log if one.method == "PUT" and "/manifests/" in one.path]
    assert committed.headers["if-none-match"] == "*"
    key = f"manifests/{manifest.id}.json"
    before = store.root.read(key)
    proxy.faults.append(Fault("status", lambda one: one.method == "HEAD", status=404))
    store.root.write(key, b"another writer was slower")
    assert store.root.read(key) == before
    assert [one.status for one in proxy.log if one.method == "PUT"][-1] == 412


def test_a_conflict_while_committing_is_tried_again(
    store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy
) -> None:
    """S3 answers so while another conditional write is under way, which may fail in the end."""
    proxy.faults.append(Fault("status", is_commit, status=409, code="ConditionalRequestConflict"))
    manifest = add(store, model)
    assert elsewhere.manifest(manifest.id) == manifest
    proxy.faults.append(Fault("status", is_commit, times=100, status=409, code="ConditionalRequestConflict"))
    with pytest.raises(StageError, match="in conflict with others again and again"):
        store.add_file(model / "config.json", "dataset", format="x", producer="test")


def test_a_commit_whose_answer_is_lost_is_done(store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy) -> None:
    proxy.faults.append(Fault("drop response", is_commit))
    manifest = add(store, model)
    assert proxy.faults[0].times == 0
    assert_same(elsewhere.materialize(elsewhere.manifest(manifest.id)), model)


def test_a_server_without_conditions_commits_too(
    store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy
) -> None:
    def is_conditional(request: Request) -> bool:
        return "if-none-match" in request.headers

    proxy.faults.append(Fault("status", is_conditional, times=100, status=501, code="NotImplemented"))
    manifest = add(store, model)
    assert_same(elsewhere.materialize(elsewhere.manifest(manifest.id)), model)


def test_a_tampered_object_is_never_handed_out(
    store: Store, elsewhere: Store, model: Path, client: Any, bucket: str
) -> None:
    manifest = add(store, model)
    for name in ("config.json", "weights.bin"):
        part = entry_of(manifest, name).objects[-1]
        place = {"Bucket": bucket, "Key": f"team/models/{object_key(part.sha256)}"}
        client.put_object(Body=bytes(part.size_bytes), **place)
        with pytest.raises(ArtifactError, match=rf"{part.sha256} \({name}\).*another content.*remove"):
            elsewhere.materialize(manifest)
        client.delete_object(**place)
        shutil.rmtree(elsewhere.directory)
        assert add(store, model) == manifest
    assert_same(elsewhere.materialize(manifest), model)


def test_a_manifest_with_other_parts_than_its_files_have_is_found_out(
    store: Store, elsewhere: Store, model: Path
) -> None:
    manifest = add(store, model)
    config, weights = manifest.files
    assert weights.parts is not None
    swapped = weights.parts.model_copy(update={"sha256": weights.parts.sha256[1::-1] + weights.parts.sha256[2:]})
    other = manifest.model_copy(update={"files": (config, weights.model_copy(update={"parts": swapped}))})
    assert other.id == manifest.id
    with pytest.raises(ArtifactError, match=r"weights.bin\).*differs from its parts"):
        elsewhere.materialize(other)


def test_a_damaged_file_of_the_cache_is_fetched_again(store: Store, elsewhere: Store, model: Path) -> None:
    manifest = add(store, model)
    damaged = elsewhere.materialize(manifest) / "config.json"
    damaged.chmod(0o644)
    damaged.write_text("[]")
    assert_same(elsewhere.materialize(manifest, verify=True), model)


def test_what_was_fetched_before_the_machine_started_anew_is_checked(
    store: Store, elsewhere: Store, model: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the power fails, a file may be left with zeros in it."""
    manifest = add(store, model)
    weights = elsewhere.materialize(manifest) / "weights.bin"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.write(bytes(100))
    assert elsewhere.materialize(manifest).joinpath("weights.bin").read_bytes()[:100] == bytes(100)
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.platform.store.s3_cache._is_older_than_boot", lambda file: True)
        assert_same(elsewhere.materialize(manifest), model)
    proxy.log.clear()
    assert_same(elsewhere.materialize(manifest), model)
    assert proxy.fetched() == []


def test_missing_and_truncated_objects_are_told_and_healed_by_adding_again(
    store: Store, elsewhere: Store, model: Path, parts: list[str], client: Any, bucket: str
) -> None:
    manifest = add(store, model)
    place = {"Bucket": bucket, "Key": f"team/models/{object_key(parts[1])}"}
    client.put_object(Body=b"short", **place)
    with pytest.raises(ArtifactError, match="another content"):
        elsewhere.materialize(manifest)
    assert add(store, model) == manifest
    assert_same(elsewhere.materialize(manifest), model)
    shutil.rmtree(elsewhere.directory)
    client.delete_object(**place)
    with pytest.raises(ArtifactError, match="is missing"):
        elsewhere.materialize(manifest)
    assert add(store, model) == manifest
    assert_same(elsewhere.materialize(manifest), model)


def test_a_file_that_changes_while_it_is_read_is_refused(
    store: Store, model: Path, parts: list[str], proxy: FaultyProxy, client: Any, bucket: str
) -> None:
    def change(request: Request) -> bool:
        if puts(parts[0])(request):
            with (model / "weights.bin").open("r+b") as file:
                file.write(b"written meanwhile")
        return False

    proxy.faults.append(Fault("status", change))
    with pytest.raises(ArtifactError, match="changed while it was added"):
        add(replace_options(store, connections=1), model)
    assert not any("/manifests/" in key for key in keys(client, bucket))


def test_a_range_is_read_from_the_parts_that_hold_it(
    store: Store, elsewhere: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    entry, content = entry_of(add(store, model), "weights.bin"), (model / "weights.bin").read_bytes()
    for start, stop in [
        (0, 1),
        (10, PART_BYTES),
        (PART_BYTES - 1, 3 * PART_BYTES + 5),
        (len(content) - 3, len(content)),
    ]:
        assert elsewhere.read_range(entry, start, stop - start) == content[start:stop]
    assert parts[4] not in proxy.fetched()
    assert elsewhere.read_range(entry, 5, 0) == b""
    with pytest.raises(ArtifactError, match=r"ends before byte \d+ of the file"):
        elsewhere.read_range(entry, len(content) - 3, 4)


def test_a_single_tensor_is_read_without_its_checkpoint(
    store: Store, elsewhere: Store, tiny_parent: Path, proxy: FaultyProxy
) -> None:
    manifest = add(store, tiny_parent)
    proxy.log.clear()
    checkpoint = Checkpoint.open(tiny_parent)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor = read_tensor(elsewhere, manifest, name)
    assert torch.equal(tensor, checkpoint.tensor(name))
    assert tensor.dtype == checkpoint.tensor(name).dtype
    assert not list(elsewhere.directory.rglob("*"))
    first, last = map(int, proxy.ranges()[-1][6:].split("-"))
    assert last + 1 - first == tensor.nbytes
    with pytest.raises(ArtifactError, match="holds a tensor 'nothing'"):
        read_tensor(elsewhere, manifest, "nothing")


def test_tensors_come_the_same_from_a_directory(tiny_parent: Path, tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    assert torch.equal(read_tensor(store, add(store, tiny_parent), name), Checkpoint.open(tiny_parent).tensor(name))


def test_new_objects_are_encrypted_with_the_key_given(store: Store, model: Path, client: Any, bucket: str) -> None:
    add(replace_options(store, kms_key="alias/models"), model)
    for key in keys(client, bucket):
        found = client.head_object(Bucket=bucket, Key=key)
        assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", "alias/models")


def test_a_missing_bucket_is_told_at_once(options: S3Options) -> None:
    with pytest.raises(ConfigError, match="there is no bucket for s3://nowhere/x; create it"):
        Store.at("s3://nowhere/x", options)


@pytest.mark.parametrize("address", ["s3://", "s3:///x", "s3://key:secret@bucket/x", "s3://bucket/a//b", "s3://b/?x"])
def test_bad_addresses_are_told(address: str, options: S3Options) -> None:
    with pytest.raises(ConfigError, match="is not of the form s3://bucket/prefix"):
        Store.at(address, options)


def test_missing_credentials_are_told(address: str, options: S3Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=r"no usable credentials for s3://.*set AWS_ACCESS_KEY_ID"):
        Store.at(address, options)


def test_refused_credentials_are_told_and_no_secret_is(options: S3Options, caplog: pytest.LogCaptureFixture) -> None:
    process, (host, port) = start_server(INITIAL_NO_AUTH_ACTION_COUNT="0")
    try:
        with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match="refused the credentials") as refused:
            Store.at("s3://bucket/x", replace(options, endpoint_url=f"http://{host}:{port}"))
    finally:
        stop_server(process)
    assert caplog.text
    for text in (str(refused.value), str(refused.value.__cause__), repr(options), caplog.text):
        assert SECRET not in text


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "AccessDenied", ConfigError, "refused the credentials for PutObject"),
        (403, "RequestTimeTooSkewed", ConfigError, "the clock here and that of the server .* differ"),
        (507, "XMinioStorageFull", StageError, "no space left.*free space there"),
        (400, "EntityTooLarge", StageError, r"answered PutObject with 400 \(EntityTooLarge: injected\)"),
        (
            501,
            "NotImplemented",
            ConfigError,
            r"cannot do PutObject \(NotImplemented: injected\); running again will",
        ),
        (404, "NoSuchBucket", ConfigError, "there is no bucket"),
    ],
)
def test_refusals_while_writing_are_told(
    status: int, code: str, error: type[Exception], message: str, store: Store, model: Path, proxy: FaultyProxy
) -> None:
    proxy.faults.append(Fault("status", lambda one: one.method == "PUT", times=10, status=status, code=code))
    with pytest.raises(error, match=message):
        add(store, model)


def test_an_unreachable_server_is_told(address: str, options: S3Options, proxy: FaultyProxy) -> None:
    gone = FaultyProxy(("127.0.0.1", 1))
    gone.stop()
    with pytest.raises(StageError, match="cannot be reached"):
        Store.at(address, replace(options, endpoint_url=gone.url, attempts=1))


def test_a_full_local_disk_is_told_and_leaves_nothing_visible(
    store: Store, elsewhere: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def read_into_full_disk(root: S3Root, entry: FileEntry, part: StoredObject, begin: Any, take: Any) -> None:
        read_part(root, entry, part, begin, full)

    read_part = S3Root._read_part
    manifest = add(store, model)
    with monkeypatch.context() as patch:
        patch.setattr(S3Root, "_read_part", read_into_full_disk)
        with pytest.raises(StageError, match="is full; free space"):
            elsewhere.materialize(manifest)
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.platform.store.s3_cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1}))
        with pytest.raises(StageError, match="let MOESAIC_CACHE name"):
            elsewhere.materialize(manifest)
    assert not list(elsewhere.directory.glob("trees/*"))
    assert_same(elsewhere.materialize(manifest), model)


def test_empty_files_are_kept_too(store: Store, elsewhere: Store, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "empty").touch()
    assert (elsewhere.materialize(add(store, tmp_path / "hollow")) / "empty").read_bytes() == b""


def test_the_environment_says_how_to_reach_the_bucket() -> None:
    options = S3Options.from_environment(
        {
            "AWS_ENDPOINT_URL": "http://general",
            "AWS_ENDPOINT_URL_S3": "http://special",
            "AWS_REGION": "eu-west-1",
            "MOESAIC_S3_PATH_STYLE": "true",
            "MOESAIC_S3_KMS_KEY": "key",
            "MOESAIC_S3_PART_MIB": "16",
            "MOESAIC_S3_CONNECTIONS": "2",
        }
    )
    assert options == S3Options("http://special", "eu-west-1", True, "key", 16 * 2**20, 2)
    assert S3Options.from_environment({}).part_bytes == 64 * 2**20
    styles = [S3Options.from_environment({"MOESAIC_S3_PATH_STYLE": given}).path_style for given in ("", "0", "yes")]
    assert styles == [None, False, True]
    with pytest.raises(ConfigError, match="MOESAIC_S3_PART_MIB = '0' is not a whole number"):
        S3Options.from_environment({"MOESAIC_S3_PART_MIB": "0"})
    with pytest.raises(ConfigError, match="MOESAIC_S3_PATH_STYLE = 'maybe'"):
        S3Options.from_environment({"MOESAIC_S3_PATH_STYLE": "maybe"})


@pytest.mark.parametrize(
    ("endpoint", "path_style", "begins"),
    [
        ("http://s3.example.com", None, "http://s3.example.com/bucket/key?"),
        ("http://s3.example.com", True, "http://s3.example.com/bucket/key?"),
        ("http://s3.example.com", False, "http://bucket.s3.example.com/key?"),
        (None, None, "https://bucket.s3.amazonaws.com/key?"),
        (None, True, "https://s3.amazonaws.com/bucket/key?"),
    ],
)
def test_the_bucket_stands_in_the_path_or_in_the_host_name(
    endpoint: str | None, path_style: bool | None, begins: str, options: S3Options
) -> None:
    client = connect(replace(options, endpoint_url=endpoint, path_style=path_style))
    asked = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    assert asked.startswith(begins)


def test_memory_stays_within_the_parts_under_way(address: str, s3_server: tuple[str, int], tmp_path: Path) -> None:
    """Four files of 16 MiB up and down again, three parts at once."""
    (tmp_path / "sparse").mkdir()
    for index in range(4):
        with (tmp_path / "sparse" / f"weights-{index}").open("wb") as file:
            file.truncate(16 * 2**20 + index)
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from moesaic.platform.store import S3Options, Store\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "options = S3Options(endpoint_url=sys.argv[1], region='us-east-1', part_bytes=2**20, connections=3)\n"
        "store = Store.at(sys.argv[2], options)\n"
        "before = peak()\n"
        "manifest = store.add_directory(Path(sys.argv[3]), 'model', format='x', producer='x')\n"
        "tree = store.materialize(manifest)\n"
        "assert sum(path.stat().st_size for path in tree.iterdir()) == 64 * 2**20 + 6\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, f"http://127.0.0.1:{s3_server[1]}", address, str(tmp_path / "sparse")]
    # Not ru_maxrss, which a new process inherits from the one that started it.
    grown_mib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < grown_mib < 20

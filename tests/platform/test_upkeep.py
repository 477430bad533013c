"""Listing, verifying and cleaning, for a store in a directory and one in a bucket; a stage on a bucket."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesaic.command_line.main import main
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models.checkpoint import Checkpoint
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.runs.runtime import run_stage
from moesaic.platform.store import FileEntry, Manifest, S3Options, Store
from moesaic.platform.store.root import object_key
from moesaic.platform.store.upkeep import delete, find_garbage, verify
from tests.data_sets import add_sets

from .conftest import PART_BYTES
from .faulty_proxy import Fault, FaultyProxy

HOUR_S = 3600.0


@pytest.fixture(params=["directory", "bucket"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return Store.at(tmp_path / "store")
    store: Store = request.getfixturevalue("store")
    return store


def add(store: Store, directory: Path) -> Manifest:
    return store.add_directory(directory, "model", format="safetensors", producer="test")


def keys(store: Store) -> set[str]:
    return {item.key for item in store.root.items("objects/")}


def remove(store: Store, key: str) -> None:
    (item,) = [item for item in store.root.items(key.rpartition("/")[0] + "/") if item.key == key]
    store.root.delete(item)


def objects_of(store: Store, entry: FileEntry) -> list[str]:
    in_bucket = store.root.address.startswith("s3://")
    return [object_key(part.sha256) for part in entry.objects] if in_bucket else [object_key(entry.sha256)]


def put_loose_objects(store: Store, tmp_path: Path, content: bytes) -> set[str]:
    """What a writer has put down that never committed."""
    (tmp_path / "loose").write_bytes(content)
    (entry,) = store.root.put_files({"loose": tmp_path / "loose"}, move=False)
    return set(objects_of(store, entry))


def test_only_what_no_manifest_references_is_garbage_and_only_after_the_grace(
    either: Store, model: Path, tmp_path: Path
) -> None:
    manifest = add(either, model)
    loose = put_loose_objects(either, tmp_path, os.urandom(PART_BYTES + 1))
    assert find_garbage(either, grace_hours=24).objects == ()
    assert find_garbage(either, grace_hours=24, now_s=time.time() + 23 * HOUR_S).objects == ()
    garbage = find_garbage(either, grace_hours=24, now_s=time.time() + 25 * HOUR_S)
    assert {item.key for item in garbage.objects} == loose
    assert garbage.size_bytes == PART_BYTES + 1
    delete(either, garbage)
    assert not keys(either) & loose
    assert verify(either, [manifest]) == []
    assert either.materialize(manifest, verify=True).is_dir()


def test_a_manifest_committed_since_keeps_its_objects(either: Store, model: Path) -> None:
    manifest = add(either, model)
    committed = f"manifests/{manifest.id}.json"
    content = either.root.read(committed)
    remove(either, committed)
    garbage = find_garbage(either, now_s=time.time() + 25 * HOUR_S)
    assert len(garbage.objects) >= 2
    either.root.write(committed, content)
    delete(either, garbage)
    assert verify(either, [manifest]) == []


def test_an_unreadable_manifest_stops_all_cleaning(either: Store, model: Path) -> None:
    add(either, model)
    either.root.write(f"manifests/{'0' * 64}.json", b"{}")
    with pytest.raises(ArtifactError, match="is not a manifest"):
        find_garbage(either, now_s=time.time() + 25 * HOUR_S)


def test_what_a_writer_relies_on_is_young_again(model: Path, tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    manifest = add(store, model)
    remove(store, f"manifests/{manifest.id}.json")
    for item in store.root.items("objects/"):
        os.utime(store.directory / item.key, (0, 0))
    assert len(find_garbage(store).objects) == 2
    add(store, model)
    remove(store, f"manifests/{manifest.id}.json")
    assert find_garbage(store).objects == ()


def test_leftovers_of_interrupted_writers_go_after_the_grace(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    half = store.directory / object_key("ab" * 32)
    half.parent.mkdir(parents=True)
    half.with_name(f".{half.name}.dead").write_bytes(b"half")
    assert find_garbage(store).leftovers == ()
    garbage = find_garbage(store, now_s=time.time() + 25 * HOUR_S)
    assert [item.size_bytes for item in garbage.leftovers] == [4]
    delete(store, garbage)
    delete(store, garbage)  # Somebody else was faster.
    assert list(store.root.leftovers()) == []


def test_parts_of_an_interrupted_upload_go_after_the_grace(
    store: Store, model: Path, parts: list[str], proxy: FaultyProxy
) -> None:
    proxy.faults.append(
        Fault("status", lambda one: one.method == "PUT" and one.object == parts[3], status=403, code="AccessDenied")
    )
    with pytest.raises(ConfigError):
        add(store, model)
    sent = {object_key(sha256) for sha256 in proxy.sent()}
    assert sent
    garbage = find_garbage(store, now_s=time.time() + 25 * HOUR_S)
    assert {item.key for item in garbage.objects} == sent
    delete(store, garbage)
    assert keys(store) == set()


@pytest.mark.parametrize("key", ["manifests/a.json", "records/a.json", "unlogged/server/a.json"])
def test_half_a_small_object_is_a_leftover_and_not_an_object(key: str, tmp_path: Path) -> None:
    root = Store.at(tmp_path).root
    root.write(key, b"{}")
    (tmp_path / key).with_name(".a.json.dead").write_bytes(b"{")
    top = key.partition("/")[0] + "/"
    assert [item.key for item in root.items(top)] == [key]
    assert [item.size_bytes for item in root.leftovers()] == [1]


def test_verifying_names_everything_missing_or_damaged(either: Store, model: Path, client: Any) -> None:
    manifest = add(either, model)
    (config,), (*_, weights) = (objects_of(either, entry) for entry in manifest.files)
    remove(either, config)
    damaged = bytes(1000 if either.root.address.startswith("s3://") else 5 * PART_BYTES + 1000)
    if either.root.address.startswith("s3://"):
        client.put_object(Bucket=either.root.address.split("/")[2], Key=f"team/models/{weights}", Body=damaged)
    else:
        (either.directory / weights).chmod(0o644)
        (either.directory / weights).write_bytes(damaged)
    missing, changed = verify(either, [manifest])
    assert "(config.json)" in missing and "is missing" in missing
    assert "(weights.bin)" in changed and "another content" in changed


@pytest.fixture
def named(either: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store as the environment names it."""
    monkeypatch.setenv("MOESAIC_STORE", either.root.address)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    return either


def test_commands_list_verify_and_clean(
    named: Store, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = add(named, model)
    (loose,) = put_loose_objects(named, tmp_path, b"of nobody")
    assert main(["store", "ls"]) == 0
    assert manifest.id[:12] in capsys.readouterr().out
    assert main(["store", "verify"]) == main(["store", "verify", manifest.id[:8]]) == 0
    assert "1 manifests are sound" in capsys.readouterr().out
    assert main(["store", "gc"]) == 0
    assert "0 objects, 0 leftovers" in capsys.readouterr().out
    time.sleep(1.1)  # S3 tells times in whole seconds.
    assert main(["store", "gc", "--grace-hours", "0"]) == 0
    assert loose in (shown := capsys.readouterr().out) and "would be deleted with --delete" in shown
    assert loose in keys(named)
    assert main(["store", "gc", "--grace-hours", "0", "--delete", "--store", named.root.address]) == 0
    assert loose not in keys(named)
    remove(named, object_key(manifest.files[0].sha256))
    assert main(["store", "verify"]) == 2
    assert "1 objects are missing or damaged" in capsys.readouterr().err


def test_wrong_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["ls"], "give --store or set MOESAIC_STORE"),
        (["ls", "--store", str(tmp_path / "nowhere")], "there is no store at"),
        (["gc", "--store", str(tmp_path), "--grace-hours", "-1"], "is negative"),
        (["verify", "--store", str(tmp_path), "abc"], "no manifest whose id starts with abc"),
    ]:
        assert main(["store", *arguments]) == 2
        assert message in capsys.readouterr().err


@dataclass
class Artifact:
    path: str


def choose_first_experts(directory: Path, parent: Path, num_experts: int) -> dict[str, Artifact]:
    """A ranking and an architecture as their stages would write them."""
    whole = Checkpoint.open(parent).architecture
    experts = whole.blocks[0].num_experts
    layer = {"order": list(range(experts)), "scores": [0.0] * experts}
    blocks = [block.as_config() | {"num_local_experts": num_experts} for block in whole.blocks]
    contents = {
        "ranking": {"criterion": "random", "num_tokens": 1, "layers": [layer] * whole.num_layers},
        "architecture": {"candidates": {"puzzle": {"blocks": blocks}}},
    }
    for name, content in contents.items():
        (directory / name).mkdir()
        (directory / name / f"{name}.json").write_text(json.dumps(content))
    return {name: Artifact(str(directory / name)) for name in contents}


def test_stages_read_from_a_bucket_and_write_to_it(
    address: str, options: S3Options, tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_STORE", address)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", options.endpoint_url or "")
    assert RunContext.from_environment().as_environment()["MOESAIC_STORE"] == address
    store = Store.at(address, options)
    sets = add_sets(store, tmp_path / "data")
    model = add(store, tiny_parent).id
    config = IngestConfig(parent=model, **sets)
    names = ("parent", "calibration_short", "calibration_long", "prompts", "tests")
    outputs = {name: Artifact(str(tmp_path / "out" / name)) for name in names}
    run_stage("ingest", config.to_json(), {}, outputs)
    assert Manifest.read(tmp_path / "out" / "parent").id == model
    assert json.loads((tmp_path / "out" / "parent" / "record.json").read_text())["metrics"]["tests_rows"] == 1
    inputs = {"parent": outputs["parent"]} | choose_first_experts(tmp_path, tiny_parent, 4)
    run_stage("prune_model", "{}", inputs, {"child": Artifact(str(tmp_path / "child"))})
    (tmp_path / "cache").rename(tmp_path / "lost")
    child = Checkpoint.open(Store.at(address, options).materialize(Manifest.read(tmp_path / "child")))
    assert [block.num_experts for block in child.architecture.blocks] == [4] * 4
    assert not (tmp_path / "s3:").exists() and not Path("s3:").exists()

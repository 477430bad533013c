"""The store keeps what it promises: whole or not at all, safe paths, and damage is told, whoever writes at once."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moesaic.core.errors import ArtifactError, StageError
from moesaic.core.progress import count_bytes
from moesaic.platform.store import FileEntry, Manifest, Store

EMPTY_SHA = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "store")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "deep").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "deep" / "weights.safetensors").write_bytes(b"weights")
    (directory / ".hidden").write_text("left out")
    return directory


def add(store: Store, directory: Path, **changes: object) -> Manifest:
    return store.add_directory(directory, "model", format="safetensors", producer="test", **changes)


def objects(store: Store) -> list[Path]:
    return sorted(path for path in (store.directory / "objects").rglob("*") if path.is_file())


def test_what_goes_in_comes_out(store: Store, model: Path) -> None:
    manifest = add(store, model)
    tree = store.materialize(manifest, verify=True)
    assert [entry.path for entry in manifest.files] == ["config.json", "deep/weights.safetensors"]
    assert (tree / "deep" / "weights.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in tree.rglob("*")) == ["config.json", "deep", "weights.safetensors"]
    assert store.manifest(manifest.id) == manifest


def test_objects_are_named_by_their_content(store: Store, model: Path) -> None:
    add(store, model)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert (store.directory / "objects" / "sha256" / digest[:2] / digest).read_bytes() == b"weights"


def test_the_same_content_gives_the_same_id_and_is_stored_once(store: Store, model: Path, tmp_path: Path) -> None:
    first = add(store, model)
    twin = tmp_path / "twin"
    (model / "deep").rename(tmp_path / "deep")
    model.rename(twin)
    (tmp_path / "deep").rename(twin / "deep")
    assert add(store, twin).id == first.id
    assert len(objects(store)) == 2


def test_the_id_is_the_digest_of_the_canonical_json(store: Store, model: Path) -> None:
    manifest = add(store, model)
    committed = (store.directory / "manifests" / f"{manifest.id}.json").read_bytes()
    assert hashlib.sha256(committed).hexdigest() == manifest.id
    assert json.loads(committed)["producer"] == "test"


def test_moving_consumes_the_source(store: Store, model: Path) -> None:
    manifest = add(store, model, move=True)
    assert not (model / "deep" / "weights.safetensors").exists()
    assert (store.materialize(manifest, verify=True) / "config.json").read_text() == "{}"


def test_a_tree_costs_no_second_copy(store: Store, model: Path) -> None:
    tree = store.materialize(add(store, model))
    assert (tree / "config.json").stat().st_ino in {path.stat().st_ino for path in objects(store)}


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "./a", "", ".", "a\\b", "a\0b"])
def test_paths_cannot_leave_the_tree(path: str) -> None:
    text = json.dumps(
        {
            "kind": "model",
            "format": "safetensors",
            "producer": "test",
            "files": [{"path": path, "size_bytes": 0, "sha256": EMPTY_SHA}],
        }
    )
    with pytest.raises(ArtifactError, match="must be relative and stay inside the tree"):
        Manifest.parse(text, "it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": []}, "at least one file"),
        ({"surprise": 1}, "surprise"),
        ({"kind": "virus"}, "kind"),
        ({"parents": ["short"]}, "parents"),
    ],
)
def test_a_bad_manifest_is_refused(change: dict[str, object], message: str) -> None:
    good = Manifest(
        kind="model", format="x", producer="x", files=(FileEntry(path="a", size_bytes=0, sha256=EMPTY_SHA),)
    )
    with pytest.raises(ArtifactError, match=message):
        Manifest.parse(json.dumps(good.model_dump(mode="json") | change), "it")


def test_a_file_cannot_also_be_a_folder() -> None:
    files = tuple(FileEntry(path=path, size_bytes=0, sha256=EMPTY_SHA) for path in ("a", "a/b"))
    with pytest.raises(ValueError, match="both files and folders"):
        Manifest(kind="model", format="x", producer="x", files=files)


def test_a_missing_object_is_told(store: Store, model: Path) -> None:
    manifest = add(store, model)
    objects(store)[0].unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        store.materialize(manifest)


def test_a_truncated_object_is_told_and_healed_by_adding_again(store: Store, model: Path) -> None:
    manifest = add(store, model)
    victim = next(path for path in objects(store) if path.read_bytes() == b"weights")
    victim.chmod(0o644)
    victim.write_bytes(b"weig")
    with pytest.raises(ArtifactError, match="has 4 bytes instead of 7"):
        store.materialize(manifest)
    assert add(store, model).id == manifest.id
    assert (store.materialize(manifest, verify=True) / "deep" / "weights.safetensors").read_bytes() == b"weights"


def test_a_tampered_object_of_the_same_size_is_found_by_verifying(store: Store, model: Path) -> None:
    manifest = add(store, model)
    victim = next(path for path in objects(store) if path.read_bytes() == b"weights")
    victim.chmod(0o644)
    victim.write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError, match="another content"):
        store.materialize(manifest, verify=True)


def test_a_changed_manifest_is_told(store: Store, model: Path) -> None:
    manifest = add(store, model)
    path = store.directory / "manifests" / f"{manifest.id}.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"test"', '"evil"'))
    with pytest.raises(ArtifactError, match="was changed"):
        store.manifest(manifest.id)


def test_a_damaged_tree_is_rebuilt(store: Store, model: Path) -> None:
    manifest = add(store, model)
    (store.materialize(manifest) / "config.json").unlink()
    assert (store.materialize(manifest) / "config.json").read_text() == "{}"


def test_unknown_and_unusable_inputs_are_told(store: Store, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no files"):
        add(store, tmp_path / "empty")
    with pytest.raises(ArtifactError, match="is not a directory"):
        add(store, tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="holds no manifest"):
        store.manifest("0" * 64)
    with pytest.raises(ArtifactError, match="is missing"):
        store.commit(
            Manifest(
                kind="model", format="x", producer="x", files=(FileEntry(path="a", size_bytes=0, sha256=EMPTY_SHA),)
            )
        )


def test_a_full_disk_leaves_nothing_half_written(store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match="is full; free space and run again"):
        add(store, model)
    assert [path for path in store.directory.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    assert store.materialize(add(store, model), verify=True).is_dir()


def test_writers_at_once_agree(store: Store, tmp_path: Path) -> None:
    directory = tmp_path / "many"
    directory.mkdir()
    for index in range(20):
        (directory / f"{index}.bin").write_bytes(bytes([index % 5]) * 10_000)
    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(lambda _: add(Store.at(store.directory), directory), range(16)))
        trees = list(pool.map(lambda one: Store.at(store.directory).materialize(one, verify=True), manifests))
    assert len({manifest.id for manifest in manifests}) == len(set(trees)) == 1
    assert len(objects(store)) == 5
    assert [path.name for path in (store.directory / "trees").iterdir()] == [manifests[0].id]


def test_a_killed_writer_leaves_no_manifest_and_can_be_repeated(store: Store, tmp_path: Path) -> None:
    directory = tmp_path / "big"
    directory.mkdir()
    for index in range(4):
        (directory / f"{index}.bin").write_bytes(os.urandom(1000))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from moesaic.platform.store import Store\n"
        "store = Store.at(Path(sys.argv[1]))\n"
        "written_whole, count = store.root._written_whole, []\n"
        "def put_two_then_die(key):\n"
        "    count.append(key)\n"
        "    if len(count) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return written_whole(key)\n"
        "store.root._written_whole = put_two_then_die\n"
        "store.add_directory(Path(sys.argv[2]), 'model', format='x', producer='x')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(store.directory), str(directory)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(objects(store)) == 2
    assert not (store.directory / "manifests").exists()
    assert store.materialize(add(store, directory), verify=True).is_dir()


def test_a_log_tells_how_far_a_transfer_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with count_bytes(2**21, "to there") as moved:
        moved(2**20)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("moesaic.core.progress._LINE_EVERY_S", 0.0)
    with count_bytes(2**21, "to there") as moved:
        moved(2**20)
    assert capsys.readouterr().err.startswith("to there: 1/2 MiB, ")

"""A store that several users share: what root puts there, tasks of another user read, use again, add to and clean."""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.core.errors import StageError
from moesaic.core.files import explained_file_errors, locked
from moesaic.platform.runs.runtime import _workspace
from moesaic.platform.store import Manifest, Store
from moesaic.platform.store.s3_cache import Cache
from moesaic.platform.store.upkeep import delete, find_garbage
from tests.other_user import as_user, needs_root

TASK, GROUP, STRANGERS = 10001, 0, 20001
HOUR_S = 3600.0


@pytest.fixture
def shared() -> Iterator[Path]:
    """The root of a volume of the group 0; pytest's own folders are closed to others."""
    directory = Path(tempfile.mkdtemp(prefix="moesaic-shared-"))
    directory.chmod(0o2775)
    before = os.umask(0o022)
    yield directory
    os.umask(before)
    shutil.rmtree(directory)


@pytest.fixture
def model(shared: Path) -> Path:
    directory = shared / "model"
    (directory / "deep").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "deep" / "weights.safetensors").write_bytes(b"weights")
    return directory


def add(store: Store, directory: Path) -> Manifest:
    return store.add_directory(directory, "model", format="safetensors", producer="test")


@needs_root
def test_a_task_uses_what_root_has_put_there(shared: Path, model: Path) -> None:
    store = Store.at(shared / "store")
    store.directory.mkdir()
    store.directory.chmod(0o775)
    before = add(store, model)
    old_s = time.time() - 48 * HOUR_S
    for path in (store.directory / "objects").rglob("*"):
        os.utime(path, (old_s, old_s))
    (model / "deep" / "rest.safetensors").write_bytes(b"rest")

    def task() -> Manifest:
        assert add(store, model).id != before.id  # two of its three files are root's
        tree = store.materialize(before, verify=True)
        assert (tree / "deep" / "weights.safetensors").read_bytes() == b"weights"
        with _workspace(store.directory, "key") as workspace:
            (workspace / "scratch" / "state").write_text("half")
        return add(store, model)

    after = as_user(TASK, GROUP, task)
    for entry in after.files:
        path = store.directory / "objects" / "sha256" / entry.sha256[:2] / entry.sha256
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert {path.stat().st_uid for path in (store.directory / "objects").rglob("*") if path.is_file()} == {0, TASK}
    with _workspace(store.directory, "key"):
        pass
    assert sorted(path.name for path in (store.directory / "scratch").iterdir()) == ["0", str(TASK)]


@needs_root
def test_an_object_of_someone_else_that_is_used_again_outlives_gc(shared: Path, model: Path) -> None:
    store = Store.at(shared)
    (entry,) = store.root.put_files({"config.json": model / "config.json"}, move=False)
    object_path = shared / "objects" / "sha256" / entry.sha256[:2] / entry.sha256
    old_s = time.time() - 48 * HOUR_S
    os.utime(object_path, (old_s, old_s))
    assert len(find_garbage(store).objects) == 1
    as_user(TASK, GROUP, lambda: store.root.put_files({"config.json": model / "config.json"}, move=False))
    assert find_garbage(store) == find_garbage(store, now_s=time.time() + 23 * HOUR_S)
    assert find_garbage(store).objects == ()
    later = find_garbage(store, now_s=time.time() + 25 * HOUR_S)
    assert len(later.objects) == len(later.leftovers) == 1
    assert as_user(TASK, GROUP, lambda: delete(store, later)) == []
    assert not object_path.exists()


@needs_root
def test_a_tree_can_be_read_wherever_the_volume_is_mounted(shared: Path, model: Path) -> None:
    store = Store.at(shared / "store")
    store.directory.mkdir()
    store.directory.chmod(0o775)
    manifest = add(store, model)
    as_user(TASK, GROUP, lambda: store.materialize(manifest))
    moved = Store.at((shared / "store").rename(shared / "elsewhere"))
    inode = (moved.directory / "trees" / manifest.id).stat().st_ino
    assert moved.materialize(manifest).stat().st_ino == inode
    assert (moved.materialize(manifest) / "deep" / "weights.safetensors").read_bytes() == b"weights"


@needs_root
def test_whoever_has_no_right_is_told_the_path_the_user_and_the_mode(shared: Path, model: Path) -> None:
    store = Store.at(shared / "store")
    add(store, model)  # root's umask: nobody else may write
    (model / "config.json").write_text('{"another": 1}')
    message = r"Permission denied for the user 10001 of the groups 20001; .*the user 0 and the group 0, drwxr-.r-x.*"
    with pytest.raises(StageError, match=message) as refusal:
        as_user(TASK, STRANGERS, lambda: add(store, model))
    assert str(store.directory / "objects" / "sha256") in str(refusal.value)
    (loose,) = store.root.put_files({"config.json": model / "config.json"}, move=False)
    garbage = find_garbage(store, now_s=time.time() + 25 * HOUR_S)
    (told,) = as_user(TASK, STRANGERS, lambda: delete(store, garbage))
    assert loose.sha256 in told
    (shared / "secret").write_text("")
    (shared / "secret").chmod(0o600)

    def read() -> None:
        with explained_file_errors(shared):
            (shared / "secret").read_text()

    with pytest.raises(StageError, match="secret belongs to the user 0 and the group 0, -rw-------"):
        as_user(TASK, STRANGERS, read)


@needs_root
def test_a_lock_and_a_fetched_file_serve_every_user_of_a_cache(shared: Path, model: Path) -> None:
    cache = Cache(shared / "cache")
    entry = Store.at(shared).root.put_files({"config.json": model / "config.json"}, move=False)[0]
    cache.directory.mkdir()
    cache.directory.chmod(0o775)
    with cache.writing():
        cache.begin([entry])  # and root is killed here

    def fetch() -> None:
        with cache.writing():
            cache.begin([entry])
            shutil.copyfile(model / "config.json", cache.partial(entry))
            cache.finish(entry)

    as_user(TASK, GROUP, fetch)
    cache.drop_damaged(entry, verify=True)
    as_user(10002, GROUP, lambda: cache.drop_damaged(entry, verify=True))
    assert cache.missing([entry]) == []


def test_a_file_system_without_modes_times_and_hard_links_will_do(
    shared: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in ("chmod", "fchmod", "utime", "link"):
        monkeypatch.setattr(os, name, refuse)
    store = Store.at(shared / "store")
    manifest = add(store, model)
    assert add(store, model) == manifest
    assert (store.materialize(manifest, verify=True) / "config.json").is_symlink()
    with _workspace(store.directory, "key"):
        pass
    assert find_garbage(store, now_s=time.time() + 25 * HOUR_S).objects == ()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(StageError, match=r"has no locks \(No locks available\).*mount it with locks"),
        locked(tmp_path / "lock"),
    ):
        pass

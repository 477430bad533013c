"""A parent by its name on a hub: what is fetched, from where, what is recorded, and what is said if it cannot be."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from moesaic.command_line.main import _add_inputs, main
from moesaic.core import hub as client
from moesaic.core.errors import ArtifactError, ConfigError, MoesaicError, StageError
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.named_model import NamedModel, find_model
from moesaic.platform.store import Store
from tests.data_sets import write_sets
from tests.hub_server import Hub, Repository, serving

NAME = "openai/gpt-oss-tiny"


@pytest.fixture
def hub(tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The tiny parent, among what else lies beside gpt-oss's weights."""
    folder = Path(shutil.copytree(tiny_parent, tmp_path / "published"))
    for name in ("original/model.safetensors", "original/config.json", "metal/model.bin", "pytorch_model.bin", "a.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never fetched")
    (folder / "LICENSE").write_text("a licence")
    with serving({NAME: Repository(folder)}, monkeypatch, tmp_path / "cache") as hub:
        yield hub


def _refusal(kind: type[MoesaicError], revision: str | None = None, name: str = NAME) -> str:
    with pytest.raises(kind) as refused:
        find_model(name, revision)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_a_checkpoint_is_made_of_is_fetched_once_and_named_by_its_commit(hub: Hub, tiny_parent: Path) -> None:
    found = find_model(NAME)
    commit = hub.repositories[NAME].commit
    assert found == NamedModel(found.folder, f"hf://{NAME}@{commit}")
    assert {path.name for path in found.folder.iterdir()} == {path.name for path in tiny_parent.iterdir()} | {"LICENSE"}
    assert Checkpoint.open(found.folder).architecture == Checkpoint.open(tiny_parent).architecture
    assert not any("original" in path or "metal" in path or path.endswith((".bin", ".py")) for path in hub.asked)
    hub.asked.clear()
    assert find_model(NAME, "main") == find_model(NAME, commit) == found
    assert not hub.fetched()


def test_offline_the_cache_is_all_there_is(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in _refusal(ArtifactError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = find_model(NAME)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(NAME) == found and not hub.asked
    (found.folder / "config.json").unlink()
    assert "only a part of it is in the cache" in _refusal(ArtifactError)


def test_what_was_cut_off_is_fetched_from_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, tiny_parent: Path) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut_after = 1000
    found = find_model(NAME)
    assert hub.ranges == ["bytes=1000-"]
    assert all(
        (found.folder / path.name).read_bytes() == path.read_bytes() for path in tiny_parent.glob("*.safetensors")
    )


def test_a_token_opens_what_is_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].token, hub.repositories[NAME].gated = "hf_right", True
    assert "is gated, and there is no token in HF_TOKEN" in _refusal(ArtifactError)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the account of your token has not been let in" in _refusal(ArtifactError)
    hub.repositories[NAME].gated = False
    said = _refusal(ArtifactError)
    assert "the server refuses the token" in said and "hf_wrong" not in said
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert find_model(NAME).folder.is_dir()


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "release/2026-11"])
def test_a_branch_a_tag_and_a_commit_are_one_thing(hub: Hub, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].revisions = ("main", revision)
    found = find_model(NAME, revision)
    assert found == find_model(NAME, hub.repositories[NAME].commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(NAME, revision) == found
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in _refusal(ArtifactError, "other")


def test_a_repository_that_was_renamed_is_found(hub: Hub, tiny_parent: Path) -> None:
    hub.moved["openai/old-name"] = NAME
    found = find_model("openai/old-name")
    assert found.source == f"hf://openai/old-name@{hub.repositories[NAME].commit}"
    assert Checkpoint.open(found.folder).architecture == Checkpoint.open(tiny_parent).architecture


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_said_unless_all_is_cached(hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.status = status
    assert str(status) in _refusal(StageError)
    hub.status = None
    found = find_model(NAME)
    hub.status = status
    assert find_model(NAME) == found


def test_a_mirror_without_the_newer_storage_is_explained(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.xet = True
    assert "404" in (said := _refusal(StageError)) and "HF_HUB_DISABLE_XET=1" in said
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert Checkpoint.open(find_model(NAME).folder).packed


def test_a_token_is_read_from_its_file(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME].token, hub.repositories[NAME].gated = "hf_right", True
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_text("hf_right\n")
    assert find_model(NAME).folder.is_dir() and hub.tokens == {"hf_right"}


def test_a_cache_that_cannot_be_written_to_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert f"{tmp_path}/file/hub" in (said := _refusal(ConfigError)) and "HF_HOME" in said


@pytest.mark.parametrize("address", ["hub.site", "http://", "ftp://hub.site", "http://[::1", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_named(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert f"HF_ENDPOINT is {address!r}, which is no address" in _refusal(ConfigError)


def test_what_cannot_be_had_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = _refusal(ArtifactError, name="openai/absent")
    assert "does not exist, or is private" in said and f"nor is there a folder {tmp_path / 'openai/absent'}" in said
    assert "there is no such branch, tag or commit" in _refusal(ArtifactError, "v9")
    folder = hub.repositories[NAME].folder
    for path in folder.glob("*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    (folder / "weights.bin").write_bytes(b"a pickle")
    assert "has none of the files *.safetensors" in _refusal(ArtifactError)
    hub.html = True
    assert "does not speak a hub's language" in _refusal(StageError)
    (tmp_path / "openai" / "here").mkdir(parents=True)
    assert find_model("openai/here") == NamedModel(Path("openai/here"))
    with pytest.raises(ConfigError, match=r"openai/here is a path here"):
        find_model("openai/here", "main")


def test_a_hub_that_does_not_answer_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Hub(url="http://127.0.0.1:9")
    gone.use(monkeypatch, tmp_path / "cache")
    assert "http://127.0.0.1:9 cannot be reached (ConnectError" in _refusal(StageError)


def test_what_no_disk_can_hold_is_not_begun(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(client.shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    said = _refusal(StageError)
    assert "has 0.0 GB free" in said and "HF_HOME" in said and not hub.fetched()


def test_a_disk_that_fills_up_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert "is full; free some" in _refusal(StageError)


def test_the_store_says_where_a_parent_came_from(hub: Hub, tmp_path: Path, tiny_parent: Path) -> None:
    data = write_sets(tmp_path / "data")
    found = find_model(NAME)
    taken = _add_inputs(tmp_path / "store", found.folder, data, found.source)
    manifest = Store.at(tmp_path / "store").manifest(taken.parent)
    assert manifest.source == f"hf://{NAME}@{hub.repositories[NAME].commit}"
    assert manifest.to_json() == type(manifest).parse(manifest.to_json(), "itself").to_json()
    local = Store.at(tmp_path / "store").manifest(_add_inputs(tmp_path / "store", tiny_parent, data).parent)
    assert local.source is None and '"source"' not in local.to_json()


def test_commands_take_names(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "search", "--recipe", "tiny_cpu", "--parent", NAME]) == 0
    assert f"hf://{NAME}@" in capsys.readouterr().err
    assert main(["inspect", NAME, "--revision", hub.repositories[NAME].commit]) == 0
    shown = capsys.readouterr()
    assert "MXFP4" in shown.out and f"hf://{NAME}@" in shown.err
    assert main(["inspect", "openai/absent"]) == 2
    assert capsys.readouterr().err.startswith("error: the model openai/absent on http://127.0.0.1")


def test_a_process_goes_by_the_variables(hub: Hub, tmp_path: Path) -> None:
    variables = os.environ | hub.variables(tmp_path / "home") | {"HF_TOKEN": "hf_of_the_user"}
    asked = f"from moesaic.models.named_model import find_model; find_model('{NAME}')"
    subprocess.run([sys.executable, "-c", asked], env=variables, check=True)
    assert hub.tokens == {"hf_of_the_user"}
    assert list((tmp_path / "home" / "hub").glob("models--openai--gpt-oss-tiny/snapshots/*/config.json"))

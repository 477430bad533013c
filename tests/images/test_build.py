"""Building: what is asked of the engine, the lock, what is refused. An engine that notes its calls stands in."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from images import build
from images.install import missing
from images.requirements import RUNTIMES

ENGINE = """#!{python}
import hashlib, os, sys, time
words = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(" ".join(words) + "\\n")
if words[0] == "build":
    name = words[words.index("--tag") + 1]
    if os.environ.get("FAILING", "none") in name:
        sys.exit("no space left on device")
    time.sleep(0.2)
if words[0] == "push":
    digest = "sha256:" + hashlib.sha256(words[-1].encode()).hexdigest()
    if "--digestfile" in words:
        with open(words[words.index("--digestfile") + 1], "w") as file:
            file.write(digest)
if words[0] == "inspect":
    repository = words[-1].rpartition(":")[0]
    print('["elsewhere/moesaic@sha256:0", "%s@sha256:%s"]' % (repository, "d" * 64))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for every engine, in front of the path; returns the file of its calls. Nothing is downloaded."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for engine in build.ENGINES:
        program = folder / engine
        program.write_text(ENGINE.format(python=sys.executable, log=str(log)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build, "fetch_wheels", lambda pins, target, python, machine, index=None: None)
    monkeypatch.setattr(build, "LOCK", tmp_path / "lock.json")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "moesaic"\nversion = "1"\n[build-system]\nrequires = []\nbuild-backend = "none"\n'
    )
    call = build._call
    monkeypatch.setattr(build, "_call", lambda words, log=None: "" if words[0] == sys.executable else call(words, log))
    return log


@pytest.mark.parametrize("engine", build.ENGINES)
def test_all_images_are_built_pushed_and_locked(engine: str, calls: Path, tmp_path: Path) -> None:
    arguments = ["--engine", engine, "--version", "v1.2.3", "--registry", "registry.internal/team/"]
    assert build.main([*arguments, "--context", str(tmp_path / "context")]) == 0
    lock = json.loads((tmp_path / "lock.json").read_text())
    assert set(lock["images"]) == set(RUNTIMES)
    search = lock["images"]["search"]
    assert search["image"].startswith("registry.internal/team/moesaic/search:1.2.3@sha256:")
    assert len(search["image"].partition("@sha256:")[2]) == 64
    assert search["base"] == build.base_of("search")
    lines = calls.read_text().splitlines()
    assert len([line for line in lines if line.startswith("build ")]) == len(RUNTIMES)
    build_of_search = next(line for line in lines if "moesaic/search:1.2.3" in line and line.startswith("build "))
    assert f"BASE_IMAGE={build.base_of('search')}" in build_of_search
    assert "VERSION=1.2.3" in build_of_search


@pytest.mark.parametrize("engine", ["podman", "buildah"])
@pytest.mark.parametrize(
    ("registry", "plain"), [("localhost:5000", True), ("127.0.0.1:5000/team", True), ("r:5000", False)]
)
def test_a_registry_on_this_machine_may_be_without_tls(
    engine: str, registry: str, plain: bool, calls: Path, tmp_path: Path
) -> None:
    where = ["--registry", registry, "--context", str(tmp_path / "context")]
    assert build.main(["--engine", engine, "--version", "1", "--only", "kv", *where]) == 0
    (push,) = [line for line in calls.read_text().splitlines() if line.startswith("push ")]
    assert ("--tls-verify=false" in push) == plain


def test_images_are_built_side_by_side(calls: Path, tmp_path: Path) -> None:
    assert build.main(["--version", "1", "--registry", "r", "--context", str(tmp_path / "context")]) == 0
    first_push = [line.split()[0] for line in calls.read_text().splitlines()].index("push")
    assert first_push >= 2, "the second build began before the first had ended"


def test_without_a_registry_nothing_is_pushed_or_locked(calls: Path, tmp_path: Path) -> None:
    assert build.main(["--version", "1", "--only", "kv", "--context", str(tmp_path / "context")]) == 0
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["build"]
    assert not (tmp_path / "lock.json").exists()


def test_the_context_holds_what_an_image_checks_itself_against(calls: Path, tmp_path: Path) -> None:
    assert build.main(["--version", "1", "--only", "rl", "--context", str(tmp_path / "context")]) == 0
    facts = json.loads((tmp_path / "context/rl/runtime.json").read_text())
    assert facts["wanted"] == ["moesaic[rl,jobs,s3]", "kfp", "mlflow-skinny"]
    assert {"kfp", "torch", "transformers"} <= set(facts["opaque"])
    assert {path.name for path in (tmp_path / "context").iterdir()} == {"install.py", "rl", "rl.log", "wheels"}


def test_a_failing_image_is_named_with_the_end_of_its_log_and_leaves_no_lock(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "moesaic/train")
    assert build.main(["--version", "1", "--registry", "r", "--context", str(tmp_path / "context")]) == 1
    said = capsys.readouterr().err
    assert "no space left on device" in said
    assert "images/train/Containerfile" in said
    assert "context/train.log" in said
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--version", "a b"], "VERSION"),
        (["--version", "1-dirty", "--registry", "r"], "uncommitted"),
        (["--version", "1", "--base", "serch=x"], "serch"),
        ([], "git"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_built(
    arguments: list[str], word: str, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(arguments) == 2
    assert word in capsys.readouterr().err
    assert not calls.exists()


def test_an_image_names_what_nobody_brought() -> None:
    assert missing(["pydantic", "rich"], [], []) == []
    assert missing(["pydantic", "no-such-package", "another-one[x]"], [], []) == ["another-one", "no-such-package"]
    assert missing(["pydantic", "no-such-package"], [], ["no-such-package"]) == []


def test_an_image_does_not_look_into_what_its_base_brings(capsys: pytest.CaptureFixture[str]) -> None:
    assert missing(["pydantic>=99"], ["pydantic"], []) == []
    assert "is not pydantic>=99" in capsys.readouterr().err

"""The local environment: what is refused and pinned where, what a failure says, and that a half-made one is mended."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from images import environment, pins
from images.environment import refuse_unsupported
from images.requirements import GPU_ONLY
from moesaic.core import virtual_environment
from moesaic.core.errors import ConfigError, StageError
from moesaic.core.virtual_environment import VirtualEnvironment, pins_for


@pytest.mark.parametrize(
    ("version", "system", "machine", "word"),
    [
        ((3, 10, 13), "linux", "x86_64", r"Python 3\.10\.13 .* make setup PYTHON="),
        ((3, 14, 0), "linux", "x86_64", r"Python 3\.14\.0"),
        ((3, 11, 7), "win32", "AMD64", "win32 on AMD64"),
        ((3, 12, 1), "darwin", "x86_64", "darwin on x86_64"),
    ],
)
def test_what_has_no_pins_is_refused_at_once(version: tuple[int, ...], system: str, machine: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        refuse_unsupported(version, system, machine)


def test_what_is_supported_is_what_the_package_says() -> None:
    for system, machine in environment.PLATFORMS:
        for python in pins.PYTHONS:
            refuse_unsupported(tuple(map(int, python.split("."))), system, machine)
    project = (environment.ROOT / "pyproject.toml").read_text()
    oldest, beyond = (".".join(map(str, version)) for version in environment.PYTHONS)
    assert f'requires-python = ">={oldest},<{beyond}"' in project
    assert all(f'"Programming Language :: Python :: {python}"' in project for python in pins.PYTHONS)


def test_pins_hold_where_their_marker_does(tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text("# why\na==1\nb==2 ; sys_platform == 'linux'\nc==3 ; sys_platform == 'darwin'\n")
    path.write_text(path.read_text() + "d==4 ; sys_platform == 'linux' and python_version >= '3.12'\n")
    assert pins_for(path, "linux", "x86_64", (3, 11)) == ["a==1", "b==2"]
    assert pins_for(path, "linux", "x86_64", (3, 13)) == ["a==1", "b==2", "d==4"]
    assert pins_for(path, "darwin", "arm64", (3, 13)) == ["a==1", "c==3"]
    path.write_text("e==5 ; platform_machine == 'x86_64'\n")
    assert pins_for(path, "linux", "x86_64", (3, 11)) == ["e==5"]
    assert pins_for(path, "linux", "aarch64", (3, 11)) == []
    path.write_text("f==6 ; implementation_name == 'pypy'\n")
    with pytest.raises(StageError, match="implementation_name"):
        pins_for(path, "linux", "x86_64", (3, 11))


def test_the_bare_interpreter_and_the_resolver_read_the_pins_alike() -> None:
    for pinned in pins.PINNED:
        for target in pinned.targets:
            python = tuple(map(int, target.python.split(".")))
            read = pins_for(pinned.pins, target.system, target.machine, python)
            versions = {name: version for name, _, version in (pin.partition("==") for pin in read)}
            assert versions == pins.pins_on(pinned.pins, target)


def test_the_cpu_pins_are_those_of_cuda_without_what_only_gpu_code_needs() -> None:
    linux = [target for target in pins.TARGETS if target.system == "linux"]
    cpu, cuda = (
        pins.pins_on(environment.PINS[build], next(one for one in linux if one.build == build))
        for build in ("cpu", "cuda")
    )
    assert cpu.items() < cuda.items()
    assert not set(GPU_ONLY) & set(cpu)
    assert set(GPU_ONLY) <= set(cuda)


@pytest.mark.parametrize(
    ("marker", "short"),
    [
        ("python_version < '3.14' and (sys_platform == 'linux' or platform_machine == 'arm64')", "a==1"),
        ("platform_machine == 'aarch64' or platform_machine == 'x86_64'", "a==1 ; sys_platform == 'linux'"),
        ("platform_machine == 'arm64'", "a==1 ; sys_platform == 'darwin'"),
    ],
)
def test_markers_are_as_short_as_they_can_be(marker: str, short: str) -> None:
    assert pins._with_short_marker(Requirement(f"a==1 ; {marker}"), pins.TARGETS) == short


def test_the_check_sees_nothing_of_this_machines_own() -> None:
    variables = {"PIP_FIND_LINKS": "/wheels", "UV_EXTRA_INDEX_URL": "file:///x", "PIP_INDEX_URL": "https://mirror"}
    assert pins.registry_alone(variables | {"HOME": "/home/me"}) == {
        "PIP_INDEX_URL": "https://mirror",
        "HOME": "/home/me",
        "MACOSX_DEPLOYMENT_TARGET": "14.0",
    }


def test_a_half_made_environment_is_made_anew_and_a_whole_one_is_kept_and_compiled(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to("/nonexistent/python")
    made = VirtualEnvironment(folder)
    made.make()
    assert made.differences(["pip==0"])[0].startswith("pip is 2")
    kept = folder / "kept"
    kept.touch()
    made.make()
    assert kept.exists()
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "ours.py").write_text("x = 1")
    (packages / "template.py").write_text("x = {{ name }} here")
    made.compile()
    assert [path.name.split(".")[0] for path in (packages / "__pycache__").iterdir()] == ["ours"]


def failing(program: Path, said: str) -> None:
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "free some disk"),
        ("Temporary failure in name resolution", "HTTPS_PROXY"),
        ("SSL: CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE"),
        ("No matching distribution found for torch==2.13.0", "make check-pins"),
    ],
)
def test_a_failed_installation_says_what_was_said_and_what_to_do(
    said: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(tmp_path / "uv", said)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(StageError) as failure:
        VirtualEnvironment(tmp_path).install("torch")
    assert said in str(failure.value)
    assert advice in str(failure.value)
    assert "Run it again" in str(failure.value)


def test_the_mark_is_gone_while_it_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / environment.MARK).touch()
    failing(tmp_path / "uv", "Connection refused")
    monkeypatch.setattr(VirtualEnvironment, "make", lambda self: None)
    monkeypatch.setattr(virtual_environment, "why_unreachable", lambda url: "no such host")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.main([str(folder)]) == 2
    assert not (folder / environment.MARK).exists()
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reached", "installed", "pins_of"),
    [(True, "None", "cpu"), (False, "'13.0'", "cuda"), (False, "None", "cpu")],
)
def test_the_pins_follow_the_build_that_was_to_be_had(
    reached: bool, installed: str, pins_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def install(self: VirtualEnvironment, *arguments: object, from_cpu_index: bool = False) -> None:
        asked.append((*arguments, from_cpu_index))
        version = self.folder / "lib/python3/site-packages/torch/version.py"
        version.parent.mkdir(parents=True, exist_ok=True)
        version.write_text(f"cuda: Optional[str] = {installed}\n")

    monkeypatch.setattr(VirtualEnvironment, "make", lambda self: None)
    monkeypatch.setattr(VirtualEnvironment, "install", install)
    monkeypatch.setattr(VirtualEnvironment, "differences", lambda self, wanted: [])
    monkeypatch.setattr(virtual_environment, "why_unreachable", lambda url: None if reached else "no such host")
    monkeypatch.setattr(sys, "platform", "linux")
    said: list[str] = []
    say: Callable[[str], None] = said.append
    environment.set_up(tmp_path, "cpu", say)
    assert asked[0][-1] is reached
    assert asked[1][:2] == ("--requirement", environment.PINS[pins_of])
    assert (tmp_path / environment.MARK).read_text() == environment.fingerprint()
    done = len(asked)
    environment.set_up(tmp_path, "auto", say)
    assert len(asked) == done, "a whole environment is not made again"
    assert any("cannot be reached (no such host)" in line for line in said) != reached
    assert any("needs several GB" in line for line in said) == (pins_of == "cuda")

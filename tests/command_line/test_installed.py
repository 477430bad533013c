"""The wheel in an empty directory: the commands run on what it brings, and import nothing of a checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was installed."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("moesaic-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def start(installed: Path, directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    """``moesaic ARGUMENTS``. Without ``site`` the checkout's own installation is not seen, only its packages."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    main = "import sys; from moesaic.command_line.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", main, *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("doctor",), "embedded engine"),
        (("plan", "search", "--recipe", "tiny_cpu", "--like", "gpt-oss-20b"), "score_blocks"),
        (("submit", "compress", "--help"), "--profile"),
        (("serve", "--help"), "checkpoint"),
        (("stage", "nonsense", "{}", "--output", "out"), "choose one of"),
    ],
)
def test_commands_find_what_they_need_in_the_wheel(
    arguments: tuple[str, ...], shown: str, installed: Path, tmp_path: Path
) -> None:
    said, _ = start(installed, tmp_path, *arguments).communicate()
    assert shown in said
    assert "ModuleNotFoundError" not in said


@pytest.mark.timeout(600)
def test_the_short_demo_begins_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    running = start(installed, tmp_path, "run", "search", "--recipe", "tiny_cpu", "--fast", "--output", "out")
    assert running.stdout is not None
    shown: list[str] = []
    try:
        for line in running.stdout:
            shown.append(line)
            if "rank_experts: done" in line:
                break
    finally:
        running.terminate()
        running.communicate()
    assert any("ingest: done" in line for line in shown), "".join(shown)
    assert "rank_experts: done" in shown[-1], "".join(shown)
    assert str(ROOT) not in "".join(shown)

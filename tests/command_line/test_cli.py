"""The command line: what it prints, what it leaves, and its exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic
from moesaic.command_line.main import main
from moesaic.models.architecture import Block
from moesaic.platform.runs.records import Record
from tests.data_sets import write_sets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sets(tmp_path / "data")


def run_search(parent: Path, data: Path, output: Path, *more: str) -> int:
    given = ["--recipe", "tiny_cpu", "--parent", str(parent), "--data", str(data), "--output", str(output)]
    return main(["run", "search", *given, *more])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moesaic {moesaic.__version__}\n"


@pytest.mark.parametrize("command", [[], ["run"], ["stage"], ["inspect"], ["report"], ["doctor"]])
def test_help_names_every_argument(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: moesaic {' '.join(command)}".strip())


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run"], ["run", "search"], ["inspect"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_the_console_script_is_this_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moesaic.command_line.main", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("moesaic ")


def test_inspect_tells_sizes_from_headers(tiny_parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_parent)]) == 0
    shown = capsys.readouterr().out
    assert "32, top-2" in shown
    assert "2 x 8, 2 x full" in shown
    assert "MXFP4" in shown
    # 2 layers of 512 tokens and 2 of 8, keys and values of 2 heads of 16, 2 bytes each: 130 KiB
    assert "0.1 MiB in bf16, 0.1 MiB in fp8, of one request of 512 tokens" in " ".join(shown.split())


def test_inspect_refuses_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "config.json does not exist" in capsys.readouterr().err


def test_unknown_pipelines_and_recipes_are_named(
    tiny_parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "nonsense", "--recipe", "tiny_cpu"]) == 2
    assert "choose one of compress, compress-2-rounds, compress-2-rounds-without-control" in capsys.readouterr().err
    assert main(["run", "search", "--recipe", "huge"]) == 2
    assert "choose one of tiny_cpu" in capsys.readouterr().err


def test_a_missing_parent_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_search(tmp_path / "nowhere", data, tmp_path / "run") == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pickled_parent_is_refused(
    tiny_parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tiny_parent / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert run_search(pickled, data, tmp_path / "run") == 2
    assert "is a pickle" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["remove", "empty"])
def test_a_missing_or_empty_data_set_is_refused(
    change: str, tiny_parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = data / "calibration_long.jsonl"
    victim.unlink()
    if change == "empty":
        victim.write_text("")
    assert run_search(tiny_parent, data, tmp_path / "run") == 2
    assert "calibration_long.jsonl" in capsys.readouterr().err


def test_a_report_needs_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_a_report_shows_the_comparison_and_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report").mkdir()
    accuracy = {"high": {"mean": 0.9, "min": 0.9, "max": 0.9}}
    difference = {"points": -5, "low_points": -9, "high_points": -1, "problems": 300, "p_value": 0.02}
    sizes = {"parameters": 1_800_000, "experts": 96, "experts_per_token": 12, "expert_width": 448}
    summary = {
        "child": "puzzle",
        "experts": {"parent": 128, "child": 96, "ratio": 0.75},
        "experts_per_token": {"parent": 16, "child": 12, "ratio": 0.75},
        "expert_width": {"parent": 512, "child": 448, "ratio": 0.875},
        "parameters": {"parent": 2_700_000, "child": 1_800_000, "ratio": 2 / 3},
        "memory_mib": {"long": {"parent": 10.0, "child": 7.5, "ratio": 0.75}},
        "kv_mib_per_request": {},
        "throughput": {},
        "request_efficiency": {"child_over_parent": {"high": 1.25}},
        "efforts": {
            "high": {
                "accuracy": {"parent": 0.95, "child": 0.9, "retention": 0.947, "difference": difference},
                "tokens_per_request": {"parent": 40.0, "child": 40.0, "ratio": 1.0},
                "tasks": {"left": "out"},
            }
        },
        "rivals": [
            sizes | {"name": "puzzle", "damage": 1.5, "accuracy": accuracy},
            sizes | {"name": "random", "damage": 7.25, "accuracy": {"high": None}},
        ],
    }
    (tmp_path / "report" / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(tmp_path)]) == 0
    lines = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["parameters", "2,700,000", "1,800,000", "0.67x"] in lines
    assert ["accuracy, high effort", "95.0 %", "90.0 %", "-5.0 [-9.0, -1.0]"] in lines
    assert ["random", "7.25", "96", "12", "448", "not measured"] in lines


def test_doctor_finds_what_runs_these_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "transformers" in shown
    assert "embedded engine" in shown


def choose(directory: Path, num_layers: int) -> None:
    for name in ("ranking", "architecture"):
        (directory / name).mkdir()
    layer = {"order": list(range(8)), "scores": [0.0] * 8}
    (directory / "ranking" / "ranking.json").write_text(json.dumps({"layers": [layer] * num_layers}))
    blocks = [Block(2, 1, 64, 8).as_config()] * num_layers
    found = {"candidates": {"puzzle": {"blocks": blocks}}}
    (directory / "architecture" / "architecture.json").write_text(json.dumps(found))


def test_a_stage_runs_without_kubeflow(tiny_parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose(tmp_path, 4)
    inputs = [f"parent={tiny_parent}", f"ranking={tmp_path / 'ranking'}", f"architecture={tmp_path / 'architecture'}"]
    given = [part for value in inputs for part in ("--input", value)]
    child = tmp_path / "child"
    command = ["stage", "prune_model", "{}", *given, "--output", str(child)]
    assert main(command) == 0
    assert Record.read(child).metrics["experts_ratio"] == 0.25
    assert main(["inspect", str(child)]) == 0
    assert "4 x 8" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["architecture", "child", "ranking"]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        ("nowhere.json", [], "neither JSON nor a file"),
        ("{}", ["--input", "parent"], "is not NAME=PATH"),
        ("{}", ["--input", "parent=a", "--input", "parent=b"], "given twice"),
        ('{"candidate": 1}', [], "candidate = 1"),
    ],
)
def test_a_bad_stage_request_exits_with_2(
    config: str, inputs: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage", "prune_model", config, *inputs, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

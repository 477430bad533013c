"""One model's evaluations, traces and curve, put together."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.measure.gather_recovery import run as gather_recovery
from moesaic.measure.gather_recovery.stage import GatherRecoveryConfig
from moesaic.measure.report.evidence import read_evidence
from moesaic.measure.report.recovery import read_recovery
from moesaic.stages import find_stage
from tests.measure.recovery_inputs import ACCURACIES, CURVE, evaluated, recovery
from tests.measure.report_inputs import inputs

DISTILLED = {"stage": "distill", "steps": 2}


def write(directory: Path, name: str, content: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(content)
    return directory


def write_evaluation(directory: Path, stage: str, **changed: Any) -> Path:
    content = evaluated("puzzle", stage, ACCURACIES[stage]) | {"steps": [DISTILLED]} | changed
    return write(directory, "evaluation.json", json.dumps(content))


def reinforced(policy: str) -> list[dict[str, Any]]:
    """The steps of a second round's policy: an earlier round's come first."""
    return [DISTILLED, {"stage": "reinforce", "policy": "earlier"}, DISTILLED, {"stage": "reinforce", "policy": policy}]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    lines = "".join(json.dumps(row) + "\n" for row in CURVE)
    single = {stage: write_evaluation(tmp_path / stage, stage) for stage in ("pruned", "distilled", "averaged")}
    caches = {stage: write_evaluation(tmp_path / stage, stage) for stage in ("fp8_unit", "fp8")}
    policies = [
        write_evaluation(tmp_path / name, f"policy {name}", steps=reinforced(name)) for name in ("high", "mixed")
    ]
    traces = write(tmp_path / "traces", "summary.json", json.dumps(recovery()["traces"]))
    return {
        "traces": traces,
        "distilled": write(tmp_path / "checkpoint", "training.jsonl", lines),
        "evaluations_policies": policies,
        **{f"evaluation_{stage}": path for stage, path in (single | caches).items()},
    }


def gather(given: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    output = tmp_path / "output"
    output.mkdir(exist_ok=True)
    metrics = gather_recovery.run(GatherRecoveryConfig(), **given, output=output, scratch=tmp_path)
    return json.loads((output / "recovery.json").read_text()), metrics


def test_stages_are_in_order_and_policies_called_as_their_steps_say(given: dict[str, Any], tmp_path: Path) -> None:
    found, metrics = gather(given, tmp_path)
    assert found["candidate"] == "puzzle"
    assert [stage["stage"] for stage in found["stages"]] == list(ACCURACIES)
    assert found["curve"] == CURVE
    assert found["traces"] == recovery()["traces"]
    assert metrics["accuracy_high_policy_mixed"] == ACCURACIES["policy mixed"][1]
    assert metrics["accuracy_low_pruned"] == ACCURACIES["pruned"][0]


def test_the_report_reads_what_is_written(given: dict[str, Any], tmp_path: Path) -> None:
    others = dict.fromkeys(("recovery_baseline", "evaluation_parent_fp8", "measurements_baseline"))
    found = read_recovery(read_evidence(**inputs()), recovery=gather(given, tmp_path)[0], **others)
    assert found.child.policies == ["policy high", "policy mixed"]


def test_the_stages_inputs_are_those_of_the_table(given: dict[str, Any]) -> None:
    assert set(find_stage("gather_recovery").required) == given.keys()


def test_an_undistilled_child_has_an_empty_curve(given: dict[str, Any], tmp_path: Path) -> None:
    (given["distilled"] / "training.jsonl").write_text("")
    assert gather(given, tmp_path)[0]["curve"] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"name": "uniform"},
            "the model of the evaluation of stage 'averaged': uniform, but of the pruned child: puzzle",
        ),
        ({"efforts": {}}, "the efforts of the evaluation of stage 'averaged'"),
    ],
)
def test_evaluations_of_different_models_or_efforts_are_refused(
    changed: dict[str, Any], message: str, given: dict[str, Any], tmp_path: Path
) -> None:
    write_evaluation(given["evaluation_averaged"], "averaged", **changed)
    with pytest.raises(ArtifactError, match=message):
        gather(given, tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [([DISTILLED], "after no reinforce step"), (reinforced("high"), "policy high.*a name of its own")],
)
def test_policies_need_names_of_their_own(
    steps: list[dict[str, Any]], message: str, given: dict[str, Any], tmp_path: Path
) -> None:
    write_evaluation(given["evaluations_policies"][1], "policy mixed", steps=steps)
    with pytest.raises(ArtifactError, match=message):
        gather(given, tmp_path)


def test_a_missing_or_broken_curve_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    (given["distilled"] / "training.jsonl").write_text("{")
    with pytest.raises(ArtifactError, match=r"training\.jsonl, line 1 of the curve is not valid JSON"):
        gather(given, tmp_path)
    (given["distilled"] / "training.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"training\.jsonl does not exist"):
        gather(given, tmp_path)

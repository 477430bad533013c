"""Collect one model's recovery: its evaluations after every stage, its traces, and its training curve.

``recovery.json`` holds the model's ``candidate`` name, ``stages`` in their order (each a name and the content of its
``evaluation.json``), the ``traces`` summary, and ``curve``, the rows of the distillation's ``training.jsonl``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import parse_json
from moesaic.core.training_curve import CURVE
from moesaic.measure.gather_recovery.stage import GatherRecoveryConfig
from moesaic.models.stage_outputs import read_json, read_text


def run(
    config: GatherRecoveryConfig,
    *,
    traces: Path,
    distilled: Path,
    evaluation_pruned: Path,
    evaluation_distilled: Path,
    evaluations_policies: Sequence[Path],
    evaluation_averaged: Path,
    evaluation_fp8_unit: Path,
    evaluation_fp8: Path,
    output: Path,
    scratch: Path,
) -> dict[str, float]:
    """Write ``recovery.json``."""
    policies = [_evaluation(directory) for directory in evaluations_policies]
    stages = [
        ("pruned", _evaluation(evaluation_pruned)),
        ("distilled", _evaluation(evaluation_distilled)),
        *((f"policy {policy_name(policy)}", policy) for policy in policies),
        ("averaged", _evaluation(evaluation_averaged)),
        ("fp8_unit", _evaluation(evaluation_fp8_unit)),
        ("fp8", _evaluation(evaluation_fp8)),
    ]
    _check(stages)
    content = {
        "candidate": stages[0][1]["name"],
        "stages": [{"stage": name, "evaluation": evaluation} for name, evaluation in stages],
        "traces": read_json(traces / "summary.json"),
        "curve": _read_curve(distilled / CURVE),
    }
    (output / "recovery.json").write_text(json.dumps(content, indent=1) + "\n")
    return _metrics(stages)


def policy_name(evaluation: Mapping[str, Any]) -> str:
    """The name of the evaluated policy: that of the last ``reinforce`` step of the checkpoint."""
    names = [str(step["policy"]) for step in evaluation.get("steps", []) if step.get("stage") == "reinforce"]
    if not names:
        raise ArtifactError(
            f"an evaluation among evaluations_policies is of {evaluation['name']!r} after no reinforce step "
            f"(its steps: {evaluation.get('steps', [])}); evaluate the checkpoints that reinforce wrote"
        )
    return names[-1]


def _evaluation(directory: Path) -> dict[str, Any]:
    evaluation = read_json(directory / "evaluation.json")
    if missing := {"name", "efforts"} - evaluation.keys():
        raise ArtifactError(f"{directory / 'evaluation.json'} lacks {sorted(missing)}; give the output of evaluate")
    return evaluation


def _check(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise ArtifactError unless all evaluations are of one model at the same efforts and have distinct names."""
    names = [name for name, _ in stages]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ArtifactError(f"several evaluations are of {sorted(repeated)}; give each policy a name of its own")
    _, pruned = stages[0]
    for stage, evaluation in stages:
        for what, this, first in (
            ("the model", evaluation["name"], pruned["name"]),
            ("the efforts", list(evaluation["efforts"]), list(pruned["efforts"])),
        ):
            if this != first:
                raise ArtifactError(
                    f"{what} of the evaluation of stage {stage!r}: {this}, but of the pruned child: {first}; "
                    f"evaluate one model's checkpoints, all with the same efforts"
                )


def _read_curve(path: Path) -> list[dict[str, float]]:
    lines = enumerate(read_text(path).split("\n"), 1)
    return [parse_json(line.encode(), f"{path}, line {number} of the curve") for number, line in lines if line]


def _metrics(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, float]:
    return {
        f"accuracy_{effort}_{stage.replace(' ', '_')}": figures["accuracy"]
        for stage, evaluation in stages
        for effort, figures in evaluation["efforts"].items()
    }

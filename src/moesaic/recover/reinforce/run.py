"""Train one policy by reinforcement learning on verifiable rewards; experts stay as they are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.nodes import Nodes
from moesaic.data.problems import Problem, Question, read_problems, spread_over_tasks
from moesaic.models.checkpoint import CURVE, Checkpoint, rewrite_checkpoint
from moesaic.models.stage_outputs import read_json
from moesaic.recover.generate_traces.run import SUMMARY
from moesaic.recover.generate_traces.traces import accuracy_by_task, read_traces
from moesaic.recover.reinforce.stage import ReinforceConfig

_FIGURES = ("accuracy_", "tokens_per_request_", "truncated_")


def run(
    config: ReinforceConfig,
    *,
    model: Path,
    prompts: Path,
    traces: Path,
    output: Path,
    scratch: Path,
    nodes: Nodes | None = None,
) -> dict[str, float]:
    """Write the policy into ``output``; a killed run goes on from its last checkpoint in ``scratch``.

    ``nodes`` are those of a cluster to train on; without them it is done here.
    """
    checkpoint = Checkpoint.open(model)
    problems = spread_over_tasks(read_problems(prompts), config.max_prompts)
    reference_tokens = read_reference_tokens(traces / SUMMARY, config)
    questions = choose_questions(config, problems, traces)
    learned = _train(config, model, questions, reference_tokens, scratch, nodes) if config.steps else {}
    curve = scratch / CURVE
    curve.touch()
    step = {"stage": "reinforce", "policy": config.name, "steps": config.steps}
    rewrite_checkpoint(checkpoint, output, learned, step, extra=[curve])
    return _metrics([json.loads(line) for line in curve.read_text().splitlines()])


def read_reference_tokens(summary: Path, config: ReinforceConfig) -> dict[str, float]:
    """The parent's mean reply length at each effort of the config.

    Raises:
        ArtifactError: if the summary of the traces does not have one of them.
    """
    efforts: Mapping[str, Any] = read_json(summary).get("efforts", {})
    missing = [effort for effort in config.efforts if effort not in efforts]
    if missing:
        raise ArtifactError(
            f"{summary} has traces of effort {', '.join(efforts) or 'none'}, the policy also needs "
            f"{', '.join(missing)}; add it to the efforts of generate_traces"
        )
    return {effort: float(efforts[effort]["tokens_per_request"]) for effort in config.efforts}


def choose_questions(config: ReinforceConfig, problems: Sequence[Problem], traces: Path) -> list[Question]:
    """Every problem at every effort, but for tasks that the parent solves too rarely or too often at an effort.

    Raises:
        ArtifactError: if the config asks for the parent's accuracy and the traces do not know it, or none is left.
    """
    asked: list[Question] = [(problem, effort) for effort in config.efforts for problem in problems]
    least, most = config.min_parent_accuracy, config.max_parent_accuracy
    if (least, most) == (0, 1):
        return asked
    accuracy = accuracy_by_task(read_traces(traces))
    for problem, effort in asked:
        if (problem.task, effort) not in accuracy:
            raise ArtifactError(
                f"{traces} has no trace of task {problem.task} at {effort} effort, so that what the parent solves of "
                "it is not known; make traces of it, or leave out min_parent_accuracy and max_parent_accuracy"
            )
    chosen = [(problem, effort) for problem, effort in asked if least <= accuracy[problem.task, effort] <= most]
    if not chosen:
        solved = ", ".join(f"{task} at {effort} {share:.3f}" for (task, effort), share in accuracy.items())
        raise ArtifactError(
            f"of no task at effort {', '.join(dict.fromkeys(config.efforts))} the parent solves a share between "
            f"min_parent_accuracy {least} and max_parent_accuracy {most} (it solves {solved}); widen them"
        )
    return chosen


def _train(
    config: ReinforceConfig,
    model: Path,
    questions: Sequence[Question],
    reference_tokens: Mapping[str, float],
    scratch: Path,
    nodes: Nodes | None,
) -> dict[str, Tensor]:
    """Engines are imported where they are used: each has an environment of its own."""
    if config.engine == "nemo_rl":
        from moesaic.recover.reinforce.nemo_rl import launch

        return launch.train(config, model, questions, reference_tokens, scratch, nodes)
    if nodes:
        raise ConfigError(
            f"engine '{config.engine}' trains in one process, but the cluster profile gives reinforce a job's nodes; "
            "choose engine 'nemo_rl', or leave reinforce out of the profile's jobs"
        )
    from moesaic.recover.reinforce.trl import grpo

    return grpo.train(config, model, questions, reference_tokens, scratch)


def _metrics(curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean reward, and per effort accuracy and length, over the first and over the last tenth of the steps."""
    tenth = -(-len(curve) // 10)
    metrics: dict[str, float] = {}
    for when, rows in (("start", curve[:tenth]), ("end", curve[len(curve) - tenth :])):
        for name in sorted({name for row in rows for name in row if name == "reward" or name.startswith(_FIGURES)}):
            metrics[f"{name}_{when}"] = fmean(row[name] for row in rows if name in row)
    return metrics

"""Train one policy by reinforcement learning on verifiable rewards; experts stay as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.core.nodes import Nodes
from moesaic.core.training_curve import CURVE, read_curve
from moesaic.data.problems import Problem, Question, read_problems, spread_over_tasks
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.stage_outputs import read_json
from moesaic.recover.generate_traces.run import SUMMARY
from moesaic.recover.reinforce.rewards import ReferenceTokens
from moesaic.recover.reinforce.stage import ReinforceConfig, check_placement

_FIGURES = ("accuracy_", "tokens_per_request_", "truncated_")


@dataclass(frozen=True)
class TaskReplies:
    """What the parent did on one task at one effort, in all its replies, truncated ones included."""

    accuracy: float
    tokens_per_request: float


ParentReplies = Mapping[tuple[str, str], TaskReplies]
"""By task and effort."""


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
    asked = all_questions(config, problems)
    replies = read_parent_replies(traces / SUMMARY, asked)
    questions = choose_questions(config, asked, replies)
    reference_tokens = {question: one.tokens_per_request for question, one in replies.items()}
    learned = _train(config, model, questions, reference_tokens, scratch, nodes) if config.steps else {}
    curve = scratch / CURVE
    curve.touch()
    step = {"stage": "reinforce", "policy": config.name, "steps": config.steps}
    rewrite_checkpoint(checkpoint, output, learned, step, extra=[curve])
    return _metrics(read_curve(curve))


def all_questions(config: ReinforceConfig, problems: Sequence[Problem]) -> list[Question]:
    """Every problem at every effort of the config."""
    return [(problem, effort) for effort in config.efforts for problem in problems]


def read_parent_replies(summary: Path, questions: Sequence[Question]) -> ParentReplies:
    """What the parent did on the task and at the effort of every question.

    Raises:
        ArtifactError: if the summary of the traces does not know one of them.
    """
    efforts: Mapping[str, Any] = read_json(summary).get("efforts", {})
    known = {
        (task, effort): TaskReplies(figures["accuracy"], figures["tokens_per_request"])
        for effort, entry in efforts.items()
        for task, figures in entry.get("tasks", {}).items()
    }
    for problem, effort in questions:
        if (problem.task, effort) not in known:
            raise ArtifactError(
                f"{summary} has no reply to task {problem.task} at {effort} effort (its efforts: "
                f"{', '.join(efforts) or 'none'}), so what the parent does there is not known; generate traces of it"
            )
    return known


def choose_questions(config: ReinforceConfig, asked: Sequence[Question], replies: ParentReplies) -> list[Question]:
    """The questions of tasks that the parent solves neither too rarely nor too often at their effort.

    Raises:
        ArtifactError: if none is left.
    """
    least, most = config.min_parent_accuracy, config.max_parent_accuracy
    chosen = [(one, effort) for one, effort in asked if least <= replies[one.task, effort].accuracy <= most]
    if not chosen:
        solved = ", ".join(f"{task} at {effort} {one.accuracy:.3f}" for (task, effort), one in replies.items())
        raise ArtifactError(
            f"of no task at effort {', '.join(dict.fromkeys(config.efforts))} the parent solves a share between "
            f"min_parent_accuracy {least} and max_parent_accuracy {most} (it solves {solved}); widen them"
        )
    return chosen


def _train(
    config: ReinforceConfig,
    model: Path,
    questions: Sequence[Question],
    reference_tokens: ReferenceTokens,
    scratch: Path,
    nodes: Nodes | None,
) -> dict[str, Tensor]:
    """Engines are imported where they are used: each has an environment of its own."""
    if config.engine == "nemo_rl":
        from moesaic.recover.reinforce.nemo_rl import launch

        return launch.train(config, model, questions, reference_tokens, scratch, nodes)
    check_placement(config, num_gpus=0, on_job=nodes is not None)
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

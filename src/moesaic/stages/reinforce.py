"""Train one policy by reinforcement learning on verifiable rewards; experts stay as they are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from moesaic.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.configs import ReinforceConfig
from moesaic.errors import ArtifactError
from moesaic.problems import Problem, read_problems, spread_over_tasks
from moesaic.stages.generate_traces import SUMMARY
from moesaic.stages.payloads import read_json

CURVE = "training.jsonl"
"""One line per optimiser step; engines write it in scratch."""
_FIGURES = ("accuracy_", "tokens_per_request_", "truncated_")


def run(
    config: ReinforceConfig, *, model: Path, prompts: Path, traces: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write the policy into ``output``; a killed run goes on from its last checkpoint in ``scratch``."""
    checkpoint = Checkpoint.open(model)
    problems = spread_over_tasks(read_problems(prompts), config.max_prompts)
    reference_tokens = read_reference_tokens(traces / SUMMARY, config)
    learned = _train(config, model, problems, reference_tokens, scratch) if config.steps else {}
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
    found: Mapping[str, Any] = read_json(summary).get("efforts", {})
    missing = [effort for effort in config.efforts if effort not in found]
    if missing:
        raise ArtifactError(
            f"{summary} has traces of effort {', '.join(found) or 'none'}, the policy also needs {', '.join(missing)}; "
            "add it to the efforts of generate_traces"
        )
    return {effort: float(found[effort]["tokens_per_request"]) for effort in config.efforts}


def _train(
    config: ReinforceConfig,
    model: Path,
    problems: Sequence[Problem],
    reference_tokens: Mapping[str, float],
    scratch: Path,
) -> dict[str, Tensor]:
    """Engines are imported where they are used: each has an environment of its own."""
    if config.engine == "nemo_rl":
        from moesaic.engines.nemo_rl import launch

        return launch.train(config, model, problems, reference_tokens, scratch)
    from moesaic.engines.trl import grpo

    return grpo.train(config, model, problems, reference_tokens, scratch)


def _metrics(curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean reward, and per effort accuracy and length, over the first and over the last tenth of the steps."""
    tenth = -(-len(curve) // 10)
    metrics: dict[str, float] = {}
    for when, rows in (("start", curve[:tenth]), ("end", curve[len(curve) - tenth :])):
        for name in sorted({name for row in rows for name in row if name == "reward" or name.startswith(_FIGURES)}):
            metrics[f"{name}_{when}"] = fmean(row[name] for row in rows if name in row)
    return metrics

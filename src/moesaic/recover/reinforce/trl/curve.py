"""The training curve of a policy: one line of ``training.jsonl`` per optimiser step, and one line in the log."""

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback

from moesaic.core.errors import StageError
from moesaic.core.live_log import LiveLog
from moesaic.core.progress import say
from moesaic.core.training_curve import append_row, resume_curve
from moesaic.recover.reinforce.rewards import EFFORT_FIGURES

_NAMES = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "undecided_prompts",
    "entropy": "entropy",
    "kl": "kl",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
}
"""TRL's names of what is kept. ``undecided_prompts``: the share of prompts whose replies all earn the same."""


class Curve(TrainerCallback):
    """Writes the curve; steps that a killed run took after its last checkpoint are cut off before they are repeated."""

    def __init__(self, path: Path, policy: str, first_step: int) -> None:
        self._path, self._policy, self._first_step, self._start_s = path, policy, first_step, time.monotonic()
        resume_curve(path, first_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check, keep and show the figures of one step; it comes before the step is checkpointed."""
        if not logs or "reward" not in logs:  # TRL's summary at the end
            return
        row = {"step": state.global_step} | {_NAMES.get(name, name): logs[name] for name in logs if _is_kept(name)}
        _check_finite(row)
        append_row(self._path, row)
        self._show(row, state.max_steps)

    def _show(self, row: dict[str, float], steps: int) -> None:
        """Progress on standard error, as ``moesaic.core.progress`` shows it, with what the policy is worth."""
        step_s = (time.monotonic() - self._start_s) / (row["step"] - self._first_step)
        efforts = ", ".join(
            f"{effort} {row[f'accuracy_{effort}']:.1%} in {row[f'tokens_per_request_{effort}']:.1f} tokens"
            for effort in ("low", "medium", "high")
            if f"accuracy_{effort}" in row
        )
        say(
            f"policy {self._policy}: {row['step']}/{steps}, reward {row['reward']:.3f}, {efforts}, "
            f"{step_s:.1f} s a step, {step_s * (steps - row['step']):.0f} s left"
        )


class LiveCurve(TrainerCallback):
    """Logs the curve into the MLflow run that the environment names. A server that fails does not stop the training."""

    def __init__(self) -> None:
        self._inner, self._live = MLflowCallback(), LiveLog()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Send the figures of a step. The first call opens the run."""
        self._live.attempt(lambda: self._inner.on_log(args, state, control, logs or {}))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the MLflow run."""
        self._live.attempt(lambda: self._inner.on_train_end(args, state, control))


def _is_kept(name: str) -> bool:
    return name in _NAMES or name.rpartition("_")[0] in EFFORT_FIGURES


def _check_finite(row: dict[str, float]) -> None:
    broken = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
    if broken:
        raise diverged(int(row["step"]), ", ".join(broken))


def diverged(step: int, sign: str) -> StageError:
    """The error that ends a diverged training."""
    return StageError(
        f"step {step}: {sign}; the policy has diverged. Lower optimizer.learning_rate or max_gradient_norm, or raise "
        "warmup_steps, and run again"
    )

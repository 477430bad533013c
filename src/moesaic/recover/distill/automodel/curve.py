"""The training curve of a distillation, and the decision that it has diverged."""

from collections import deque
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from statistics import fmean

from moesaic.core.errors import StageError
from moesaic.core.training_curve import append_row, kept_rows, resume_curve

WINDOW_STEPS = 10
"""The running loss is the mean of so many steps."""
_ADVICE = "lower optimizer.learning_rate or raise optimizer.warmup_steps"


class Curve:
    """Writes ``training.jsonl`` and checks the loss for divergence."""

    def __init__(self, path: Path, divergence_ratio: float, resumed_step: int, writes: bool) -> None:
        """Continue after ``resumed_step``; rows of later steps are deleted.

        Args:
            path: the file, which need not exist.
            divergence_ratio: see ``DistillConfig``.
            resumed_step: the step whose weights training goes on from.
            writes: whether this process writes the file; the other processes only check for divergence.
        """
        self._divergence = DivergenceCheck(divergence_ratio)
        self._path = path if writes else None
        for row in (resume_curve if writes else kept_rows)(path, resumed_step):
            self._divergence.add(row)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the figures of a step, or of an evaluation after it.

        Raises:
            StageError: if they show that training diverges.
        """
        row = {"step": step, **values}
        if self._path is not None:
            append_row(self._path, row)
        self._divergence.add(row)


class DivergenceCheck:
    """Ends a run whose loss is not finite, or whose running loss exceeds ``ratio`` times its lowest value.

    The lowest value begins as the held-out loss before training.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._lowest = float("inf")

    def add(self, row: Mapping[str, float]) -> None:
        """Check a row of the curve; raise StageError if the run has diverged."""
        step, loss = row["step"], row.get("loss", row.get("held_out_loss", 0.0))
        if not isfinite(loss):
            raise StageError(f"the loss at step {step:g} is {loss}; {_ADVICE}")
        if "loss" in row:
            self._recent.append(loss)
        elif step == 0:
            self._lowest = loss
        if len(self._recent) == WINDOW_STEPS:
            self._compare(step, fmean(self._recent))

    def _compare(self, step: float, running: float) -> None:
        self._lowest = min(self._lowest, running)
        if running > self._ratio * self._lowest:
            raise StageError(
                f"training diverges: at step {step:g} the mean loss of the last {WINDOW_STEPS} steps is {running:.4g}, "
                f"more than {self._ratio:g} times the lowest so far, {self._lowest:.4g}; {_ADVICE}, or raise "
                "divergence_ratio"
            )

"""Messages from the engine's processes to the stage that started them: progress, and the reason of a failure."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesaic.core.errors import MoesaicError

PREFIX = "distill: "
"""Lines that the stage passes on begin with it; everything else that an engine prints stays in its log."""
_LINE_EVERY_S = 5.0


@contextmanager
def write_failure(path: Path) -> Iterator[None]:
    """Write an exception's message to ``path``, unless another rank has written one, and raise it again."""
    try:
        yield
    except Exception as failure:
        explained = isinstance(failure, MoesaicError)
        with suppress(FileExistsError), path.open("x") as file:
            file.write(str(failure) if explained else f"{type(failure).__name__}: {failure}")
        raise


class Pace:
    """Progress for people: a line every few seconds, and at the end."""

    def __init__(self, num_steps: int, done: int) -> None:
        self._num_steps, self._first = num_steps, done
        self._start = self._last_step = self._last_line = time.monotonic()

    def step(self, step: int, loss: float, num_tokens: int, shown: bool) -> float:
        """Note that a step is done; returns its tokens per second."""
        now = time.monotonic()
        speed = num_tokens / (now - self._last_step)
        self._last_step = now
        if shown and (now - self._last_line >= _LINE_EVERY_S or step == self._num_steps):
            left = (now - self._start) / (step - self._first) * (self._num_steps - step)
            line = f"step {step}/{self._num_steps}, loss {loss:.4f}, {speed:.0f} tokens/s, {left:.0f} s left"
            print(PREFIX + line, file=sys.stderr, flush=True)
            self._last_line = now
        return speed

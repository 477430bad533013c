"""Figures sent to a server while a model trains: a server that fails costs some of them, never the training."""

import logging
import time
from collections.abc import Callable

_PAUSE_S = 300.0
"""After a failure, nothing is sent for so long: waiting for a dead server at every step would stop the training too."""

logger = logging.getLogger(__name__)


class LiveLog:
    """Tries, and pauses after a failure. The stage's own curve file holds all that is left out."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s, self._resumes_s = now_s, float("-inf")

    def attempt(self, send: Callable[[], object]) -> None:
        """Send, unless a failure was a moment ago."""
        if self._now_s() < self._resumes_s:
            return
        try:
            send()
        except Exception as lost:
            self._resumes_s = self._now_s() + _PAUSE_S
            logger.warning("the curve is not logged to MLflow for the next %.0f s: %s", _PAUSE_S, type(lost).__name__)

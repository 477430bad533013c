"""Sends figures to a server during training. If the server fails, figures are lost but training continues."""

import logging
import time
from collections.abc import Callable

_PAUSE_S = 300.0
"""The pause after a failure; waiting for a dead server at every step would stall the training."""

logger = logging.getLogger(__name__)


class LiveLog:
    """Sends figures and pauses after a failure. The stage's own curve file holds all figures."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s, self._resumes_s = now_s, float("-inf")

    def attempt(self, send: Callable[[], object]) -> None:
        """Send, unless the last failure was less than the pause ago."""
        if self._now_s() < self._resumes_s:
            return
        try:
            send()
        except Exception as lost:
            self._resumes_s = self._now_s() + _PAUSE_S
            logger.warning("the curve is not logged to MLflow for the next %.0f s: %s", _PAUSE_S, type(lost).__name__)

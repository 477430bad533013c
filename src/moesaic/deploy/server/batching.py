"""Continuous batching: one thread that owns the model, and a batch that replies join and leave between decode steps.

Each turn lets waiting replies in, in the order they came, reads at most ``PREFILL_TOKENS`` of prompts (or one longer
prompt), chooses a token for every reply in the batch, hands the new text out, lets finished replies go and takes one
decode step. A reply reserves room for its full length before it starts, so that none has to be thrown out half-way.
"""

import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.replies import Piece, Writer
from moesaic.deploy.server.sampling import Draw, SamplingParams, choose
from moesaic.models.generation import PREFILL_TOKENS, Decoding, read_prompts

Finish = Literal["stop", "length", "failed", "closed"]
"""A stop token or text; the token limit; an error of the batcher; the server stopped before the reply was done."""

_LOG = logging.getLogger(__name__)


class Full(Exception):
    """The queue has no room."""


class Closed(Exception):
    """The server is stopping and takes nothing new."""


@dataclass(frozen=True)
class Event:
    """What one token adds to a reply; the last event says why there are no more."""

    pieces: tuple[Piece, ...]
    finish: Finish | None = None


class Reply:
    """One reply on its way through the batcher, which alone changes it; ``eq`` is identity."""

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, writer: Writer) -> None:
        self.prompt, self.sampling = tuple(prompt), sampling
        self.token_ids: list[int] = []
        self.cancelled = False
        self._writer = writer
        self._generator = random.Random(sampling.seed)

    @property
    def num_generated(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of a reply that uses all it may."""
        return len(self.prompt) + self.sampling.max_tokens

    def draw(self) -> Draw:
        """The parameters and the random number for its next token."""
        return Draw(self.sampling, self._generator.random(), self.num_generated)

    def take(self, token: int) -> Event:
        """Append a token."""
        self.token_ids.append(token)
        may_stop = self.num_generated >= self.sampling.min_tokens
        ends = token in self.sampling.stop_ids
        pieces = self._writer.add(token, may_stop)
        finish: Finish | None = "stop" if ends or self._writer.stopped else None
        if finish is None and self.num_generated == self.sampling.max_tokens:
            finish = "length"
        return Event((*pieces, *self._writer.finish()) if finish else tuple(pieces), finish)


Deliver = Callable[[Sequence[tuple[Reply, Event]]], None]
"""Called from the batcher's thread with all events of a turn."""


class Batcher:
    """Generates the replies that are submitted to it. Every reply gets events until one has a ``finish``."""

    def __init__(self, model: PreTrainedModel, limits: ServerLimits) -> None:
        self._model, self.limits = model, limits
        self._waiting: deque[Reply] = deque()
        self._running: list[Reply] = []
        self._decoding: Decoding | None = None
        self._changed = threading.Condition()
        self._closed = self._aborted = False
        self._thread: threading.Thread | None = None
        self.num_generated = 0
        """Tokens of all replies so far."""
        self.num_steps = 0
        """Times that a token was chosen for every reply in the batch."""
        self.finished: Counter[str] = Counter()
        """Replies by why they ended; ``cancelled`` ones had lost their client."""

    def start(self, deliver: Deliver) -> None:
        """Start the thread that generates."""
        self._deliver = deliver
        self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Replies in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Replies that wait for a place."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """Whether new replies are taken on."""
        return not self._closed

    @property
    def is_idle(self) -> bool:
        """Whether every reply is done."""
        with self._changed:
            return not self._running and not self._waiting

    def submit(self, replies: Sequence[Reply]) -> None:
        """Queue all of these, or none.

        Raises:
            Closed: if the batcher is stopping.
            Full: if they do not fit the queue beside what waits already, even with the places that are free now.
        """
        with self._changed:
            if self._closed:
                raise Closed
            free = max(0, self.limits.max_batch - len(self._running))
            if len(self._waiting) + len(replies) > self.limits.max_waiting + free:
                raise Full
            self._waiting.extend(replies)
            self._changed.notify()

    def cancel(self, replies: Sequence[Reply]) -> None:
        """Nobody waits for these any more: they leave before the next token, without an event."""
        with self._changed:
            for reply in replies:
                reply.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take nothing new on; what was taken on goes on."""
        with self._changed:
            self._closed = True

    def abort(self) -> None:
        """End everything now, then the thread."""
        with self._changed:
            self._closed = self._aborted = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except Exception:
                _LOG.exception("a decode step failed; its replies end here and the server goes on")
                self._end(self._running, "failed")
        with self._changed:
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        self._end(left, "closed")

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._running or self._waiting)
            return not self._aborted

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        if self._decoding is None:
            return
        tokens = choose(self._decoding.logits, [reply.draw() for reply in self._running])
        events = [(reply, reply.take(token)) for reply, token in zip(self._running, tokens.tolist(), strict=True)]
        self.num_steps += 1
        self.num_generated += len(events)
        self.finished.update(event.finish for _, event in events if event.finish is not None)
        live = [row for row, (_, event) in enumerate(events) if event.finish is None]
        self._keep(live)
        self._deliver(events)
        if self._decoding is not None:
            self._decoding.step(tokens[live])

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = sum(reply.cancelled for reply in (*self._running, *self._waiting))
            if not gone:
                return
            self._waiting = deque(reply for reply in self._waiting if not reply.cancelled)
        self.finished["cancelled"] += gone
        self._keep([row for row, reply in enumerate(self._running) if not reply.cancelled])

    def _keep(self, rows: Sequence[int]) -> None:
        """Remove all other rows from the batch."""
        if len(rows) == len(self._running):
            return
        self._running = [self._running[row] for row in rows]
        if not rows:
            self._decoding = None
        elif self._decoding is not None:
            self._decoding.keep(rows)

    def _admit(self) -> None:
        """Read the prompts of those that are let in, and put them into the batch."""
        with self._changed:
            joining: list[Reply] = []
            while self._waiting and self._has_room(joining, self._waiting[0]):
                joining.append(self._waiting.popleft())
            self._running = [*self._running, *joining]
        if not joining:
            return
        fresh = read_prompts(self._model, [reply.prompt for reply in joining])
        if self._decoding is None:
            self._decoding = fresh
        else:
            self._decoding.join(fresh)

    def _has_room(self, joining: Sequence[Reply], reply: Reply) -> bool:
        batch = [*self._running, *joining, reply]
        prompts = [len(other.prompt) for other in (*joining, reply)]
        return len(batch) == 1 or (
            len(batch) <= self.limits.max_batch
            and len(batch) * max(other.longest for other in batch) <= self.limits.max_cache_tokens
            and (len(prompts) == 1 or len(prompts) * max(prompts) <= PREFILL_TOKENS)
        )

    def _end(self, replies: Sequence[Reply], why: Finish) -> None:
        """Tell these, which include all in the batch, that nothing more comes."""
        self._decoding, self._running = None, []
        self.finished[why] += len(replies)
        self._deliver([(reply, Event((), why)) for reply in replies])

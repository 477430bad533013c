"""One HTTP request's replies, between the batcher's thread and the event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from moesaic.deploy.server.batching import Batcher, Closed, Event, Full, Reply
from moesaic.deploy.server.protocol import RequestError


class Exchanges:
    """Hands the batcher's events to the requests that wait for them."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._open: dict[Reply, Exchange] = {}

    def start(self) -> None:
        """Start the batcher; its events come in on this event loop."""
        loop = asyncio.get_running_loop()
        self._batcher.start(lambda events: _call_soon(loop, self._dispatch, events))

    def open(self, replies: Sequence[Reply]) -> "Exchange":
        """Queue the replies.

        Raises:
            RequestError: 429 if the queue is full, 503 if the server is stopping.
        """
        exchange = Exchange(self, replies)
        self._open.update(dict.fromkeys(replies, exchange))
        try:
            self._batcher.submit(replies)
        except (Full, Closed) as refusal:
            self.forget(replies)
            if isinstance(refusal, Full):
                raise RequestError(429, "the queue is full; try again", code="queue_full") from refusal
            raise stopping() from refusal
        return exchange

    def forget(self, replies: Sequence[Reply]) -> None:
        """No events of these are wanted any more; those that are not done leave the batch."""
        gone = [reply for reply in replies if self._open.pop(reply, None)]
        if gone:
            self._batcher.cancel(gone)

    def _dispatch(self, events: Sequence[tuple[Reply, Event]]) -> None:
        for reply, event in events:
            exchange = self._open.get(reply) if event.finish is None else self._open.pop(reply, None)
            if exchange is not None:
                exchange.put(reply, event)


class Exchange:
    """The replies to one request."""

    def __init__(self, exchanges: Exchanges, replies: Sequence[Reply]) -> None:
        self._exchanges = exchanges
        self._indices = {reply: index for index, reply in enumerate(replies)}
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    @property
    def num_generated(self) -> int:
        """Tokens of all replies so far."""
        return sum(reply.num_generated for reply in self._indices)

    @property
    def token_ids(self) -> list[list[int]]:
        """Generated token ids of every reply so far."""
        return [list(reply.token_ids) for reply in self._indices]

    def put(self, reply: Reply, event: Event) -> None:
        """Queue an event."""
        self._queue.put_nowait((self._indices[reply], event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Every event with the index of its reply, to the end of the last reply.

        Raises:
            RequestError: 500 if the batcher failed, 503 if the server stops before the end.
        """
        for _ in self._indices:
            finish = None
            while finish is None:
                index, event = await self._queue.get()
                finish = event.finish
                if finish == "failed":
                    raise RequestError(500, "the reply could not be generated; the server's log says why")
                if finish == "closed":
                    raise stopping()
                yield index, event

    def close(self) -> None:
        """Stop the replies that are not done."""
        self._exchanges.forget(list(self._indices))


def stopping() -> RequestError:
    """What a request gets while the server stops."""
    return RequestError(503, "the server is stopping", code="stopping")


def _call_soon(loop: asyncio.AbstractEventLoop, *call: object) -> None:
    """Call on the event loop, unless it is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(*call)  # type: ignore[arg-type]

"""Replies of a server to prompts of token ids, as token ids: many requests at once, by the ``openai`` client."""

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moesaic.core.errors import ConfigError, StageError
from moesaic.deploy.engines.server_process import Server
from moesaic.models.generation import Generated

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_MAX_RETRIES = 5
_LOOK_AFTER_S = 1.0

Arrival = tuple[int, Generated]
"""A reply and the place of what asked for it."""


@dataclass(frozen=True)
class Completion:
    """A request for one completion."""

    id: str
    """For messages."""
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class RequestSettings:
    """Settings that all requests have in common."""

    stop_ids: frozenset[int]
    """A reply that is whole ends with one of these."""
    max_requests: int
    """In flight at once."""
    reply_timeout_s: float


def check_client() -> None:
    """Raise ConfigError if the ``openai`` client is not installed."""
    if find_spec("openai") is None:
        raise ConfigError("asking a server needs the package openai; pip install 'moesaic[evaluate]'")


def complete(server: Server, wanted: Sequence[Completion], settings: RequestSettings) -> Generator[Arrival, None, None]:
    """The replies as they come in.

    Raises:
        StageError: if the server dies, refuses a request, or leaves token ids out.
    """
    with asyncio.Runner() as runner:
        arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        asking = runner.get_loop().create_task(_ask_all(server, wanted, settings, arrivals))
        for _ in wanted:
            yield runner.run(_next(server, arrivals, asking))
        runner.run(asyncio.wait_for(asking, None))  # it still has connections to close


async def _next(server: Server, arrivals: asyncio.Queue[Arrival], asking: asyncio.Task[None]) -> Arrival:
    while True:
        try:
            return await asyncio.wait_for(arrivals.get(), _LOOK_AFTER_S)
        except TimeoutError:
            server.check_alive()
            if asking.done() and arrivals.empty():
                asking.result()


async def _ask_all(
    server: Server, wanted: Sequence[Completion], settings: RequestSettings, arrivals: asyncio.Queue[Arrival]
) -> None:
    """The server is near, so no proxy is asked.

    The first failure ends the other requests before the client closes: a connection made later would stay open.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async with AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        timeout=settings.reply_timeout_s,
        max_retries=_MAX_RETRIES,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        places = iter(range(len(wanted)))

        async def ask() -> None:
            for place in places:
                arrivals.put_nowait((place, await _reply(client, server, wanted[place], settings.stop_ids)))

        try:
            async with asyncio.TaskGroup() as requests:
                for _ in range(min(settings.max_requests, len(wanted))):
                    requests.create_task(ask())
        except ExceptionGroup as failures:
            raise failures.exceptions[0]  # noqa: B904 - one failure, with its own cause, says it all


async def _reply(client: "AsyncOpenAI", server: Server, wanted: Completion, stop_ids: frozenset[int]) -> Generated:
    from openai import OpenAIError

    try:
        completion = await client.completions.create(
            model=server.model,
            prompt=list(wanted.prompt),
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed,
            extra_body=server.token_options,
        )
    except OpenAIError as failure:
        server.check_alive()
        raise StageError(f"the server at {server.url} did not reply to {wanted.id!r}: {failure}") from failure
    (choice,) = completion.choices
    token_ids: list[int] | None = getattr(choice, "token_ids", None)
    truncated = choice.finish_reason == "length"
    if not token_ids or not (truncated or token_ids[-1] in stop_ids):
        raise StageError(
            f"the reply to {wanted.id!r} ended ({choice.finish_reason}) with token ids {(token_ids or [])[-3:]}; the "
            f"server must name all of them, the last of a whole reply being one of {sorted(stop_ids)}"
        )
    return Generated(tuple(token_ids), truncated)

"""Replies of a server to prompts of token ids, as token ids: many requests at once, by the ``openai`` client."""

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, ValidationError

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.network import proxy_for, tls_context
from moesaic.deploy.engines.server_answers import explain, shown, unexpected
from moesaic.deploy.engines.server_process import Server
from moesaic.models.generation import Generated

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_MAX_RETRIES = 5
_LOOK_AFTER_S = 1.0
_EXPECTED = "a completion in the OpenAI API's form"

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


class _Choice(BaseModel):
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Answer(BaseModel):
    """What is read of an answer; one reply was asked for."""

    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


def check_client() -> None:
    """Raise ConfigError if the ``openai`` client is not installed."""
    if find_spec("openai") is None:
        raise ConfigError("asking a server needs the package openai; pip install 'moesaic[evaluate]'")


def complete(server: Server, wanted: Sequence[Completion], settings: RequestSettings) -> Generator[Arrival, None, None]:
    """The replies as they come in.

    Raises:
        ConfigError: if the server refuses the key, sends elsewhere, or is none of this API.
        StageError: if it dies, refuses a request, or leaves token ids out.
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
    """The first failure ends the other requests before the client closes: a connection made later would stay open."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async with AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key=server.key or "none",
        timeout=settings.reply_timeout_s,
        max_retries=_MAX_RETRIES,
        http_client=DefaultAsyncHttpxClient(
            trust_env=False, proxy=proxy_for(server.url), verify=tls_context(), follow_redirects=False
        ),
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
    choice = _read(server, await _ask(client, server, wanted))
    token_ids = choice.token_ids
    truncated = choice.finish_reason == "length"
    if not token_ids or not (truncated or token_ids[-1] in stop_ids):
        raise StageError(
            f"the reply to {wanted.id!r} ended ({choice.finish_reason}) with token ids {(token_ids or [])[-3:]}; the "
            f"server must name all of them, the last of a whole reply being one of {sorted(stop_ids)}"
        )
    return Generated(tuple(token_ids), truncated)


async def _ask(client: "AsyncOpenAI", server: Server, wanted: Completion) -> str:
    """The text of the answer; the client's own reading of it takes a page to log in for a completion."""
    from openai import APIStatusError, OpenAIError

    url = f"{server.url}/v1/completions"
    try:
        answer = await client.completions.with_raw_response.create(
            model=server.model,
            prompt=list(wanted.prompt),
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed,
            extra_body=server.token_options,
        )
        text = str(answer.content.decode())
    except APIStatusError as refusal:
        server.check_alive()
        status, said = refusal.status_code, refusal.response.text
        if status in (400, 413, 422, 429) or status >= 500:  # it is such a server, and says what it does not like
            raise StageError(
                f"the server at {server.url} did not reply to {wanted.id!r}: {status} ({shown(said)})"
            ) from refusal
        raise explain(url, status, said, _EXPECTED, refusal.response.headers.get("location")) from refusal
    except (OpenAIError, UnicodeDecodeError) as failure:
        server.check_alive()
        why = f"{failure} {failure.__cause__ or ''}"
        raise StageError(f"the server at {server.url} did not reply to {wanted.id!r}: {shown(why)}") from failure
    if answer.status_code != 200:
        raise explain(url, answer.status_code, text, _EXPECTED)
    return text


def _read(server: Server, text: str) -> _Choice:
    try:
        (choice,) = _Answer.model_validate_json(text).choices
    except ValidationError as strange:
        raise unexpected(f"{server.url}/v1/completions", text, _EXPECTED) from strange
    return choice

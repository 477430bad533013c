"""The endpoints: chat and plain completions, streamed or whole; models, health and metrics."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from moesaic.deploy.server.batching import Batcher, Reply
from moesaic.deploy.server.exchange import Exchange, Exchanges, stopping
from moesaic.deploy.server.metrics import CountingRequests, Metrics
from moesaic.deploy.server.protocol import Body, ChatRequest, CompletionRequest, RequestError, parse
from moesaic.deploy.server.schema import describe
from moesaic.deploy.server.served_model import ServedModel
from moesaic.deploy.server.shapes import ChatShape, CompletionShape, Shape

_CLIENT_GONE = 499
_RETRY_AFTER_S = "1"
"""When a refused client may try again."""


def create_app(served: ServedModel, batcher: Batcher) -> FastAPI:
    """The application; its lifespan starts the batcher and ends it."""
    exchanges, metrics = Exchanges(batcher), Metrics(batcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        exchanges.start()
        yield
        await asyncio.to_thread(batcher.abort)

    app = FastAPI(title="Moesaic", description=f"An OpenAI-compatible server of {served.name}.", lifespan=lifespan)
    app.add_middleware(CountingRequests, metrics=metrics)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _fail)
    endpoints = Endpoints(served, batcher, exchanges, metrics)
    pages: dict[str, Callable[..., Coroutine[Any, Any, Response]]] = {
        "/health": endpoints.health,
        "/metrics": endpoints.prometheus,
        "/v1/models": endpoints.models,
        "/v1/models/{model:path}": endpoints.model,
    }
    for path, endpoint in pages.items():
        app.add_api_route(path, endpoint)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", endpoints.completions, methods=["POST"])
    describe(app, served.name)
    return app


@dataclass(frozen=True)
class Endpoints:
    """What each path answers."""

    served: ServedModel
    batcher: Batcher
    exchanges: Exchanges
    metrics: Metrics

    async def health(self) -> Response:
        """200 while requests are taken on, 503 once the server is stopping."""
        self._check_open()
        return JSONResponse({"status": "ok"})

    async def prometheus(self) -> Response:
        """Counters and gauges in Prometheus' text format."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self.served.entry]})

    async def model(self, model: str) -> Response:
        """The model of this name."""
        self.served.check_name(model)
        return JSONResponse(self.served.entry)

    async def chat_completions(self, request: Request) -> Response:
        """Reply to a conversation; the analysis is ``reasoning_content``, the answer ``content``."""
        return await self._answer(request, ChatRequest, self.served.chat_replies, ChatShape)

    async def completions(self, request: Request) -> Response:
        """Continue a prompt, given as text or as token ids."""
        return await self._answer(request, CompletionRequest, self.served.completion_replies, CompletionShape)

    def _check_open(self) -> None:
        if not self.batcher.is_open:
            raise stopping()

    async def _answer(
        self, request: Request, kind: type[Body], replies_to: Callable[[Body], list[Reply]], shape: type[Shape]
    ) -> Response:
        self._check_open()
        asked = parse(kind, await _read(request, self.served.limits.max_body_bytes))
        replies = await asyncio.to_thread(replies_to, asked)
        exchange = self.exchanges.open(replies)
        num_prompt_tokens = sum(len(reply.prompt) for reply in replies[:: asked.n or 1])
        self.metrics.num_prompt_tokens += num_prompt_tokens
        form = shape(self.served.name, num_prompt_tokens, len(replies))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage is True
            return _Stream(_chunks(exchange, form, usage), exchange)
        try:
            named = isinstance(asked, CompletionRequest) and asked.return_token_ids is True
            return await _unless_gone(request, _whole(exchange, form, named))
        finally:
            exchange.close()


async def _read(request: Request, most: int) -> bytes:
    """The body of a JSON request, as far as it may go."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"content-type is {kind[:100]!r}; send application/json")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise RequestError(413, f"the body is larger than {most} bytes")
    except ClientDisconnect as gone:
        raise RequestError(400, "the client went before its request was complete") from gone
    return bytes(body)


async def _whole(exchange: Exchange, form: Shape, token_ids: bool) -> Response:
    async for index, event in exchange.events():
        form.add(index, event)
    return JSONResponse(form.whole(exchange.num_generated, exchange.token_ids if token_ids else ()))


async def _chunks(exchange: Exchange, form: Shape, usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events. The status is sent by then: an error becomes the last event."""
    try:
        async for index, event in exchange.events():
            for chunk in form.chunks(index, event):
                yield _sse(chunk | ({"usage": None} if usage else {}))
        if usage:
            yield _sse(form.usage_chunk(exchange.num_generated))
        yield b"data: [DONE]\n\n"
    except RequestError as failure:
        yield _sse(failure.body())


def _sse(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _Stream(StreamingResponse):
    """Frees the replies' places when the client goes, even before the first byte."""

    def __init__(self, chunks: AsyncIterator[bytes], exchange: Exchange) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The work's response, or an empty one that nobody reads when the client goes first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=_CLIENT_GONE)
    finally:
        working.cancel()
        leaving.cancel()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, RequestError)
    headers = {"retry-after": _RETRY_AFTER_S} if refusal.status in (429, 503) else None
    return JSONResponse(refusal.body(), refusal.status, headers)


async def _refuse_http(request: Request, refusal: Exception) -> Response:
    """Unknown paths and methods, in the same shape."""
    assert isinstance(refusal, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {refusal.detail}"
    body = RequestError(refusal.status_code, message).body()
    return JSONResponse(body, refusal.status_code, refusal.headers)


async def _fail(_: Request, __: Exception) -> Response:
    """An error of ours; the server logs it."""
    return JSONResponse(RequestError(500, "the request failed; the server's log says why").body(), 500)

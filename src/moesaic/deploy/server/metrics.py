"""The server's own counts, in Prometheus' text format."""

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.deploy.server.batching import Batcher


class Metrics:
    """Counts of requests and tokens; the batcher's are read where they are."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status of the reply; a stream counts when it begins."""
        self.num_prompt_tokens = 0
        """Of accepted requests, as their usage says it."""

    def text(self) -> str:
        """What ``GET /metrics`` returns."""
        batcher = self._batcher
        requests = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(self.requests.items())}
        finished = {f'{{reason="{reason}"}}': count for reason, count in sorted(batcher.finished.items())}
        families: list[tuple[str, str, str, dict[str, int]]] = [
            ("requests_total", "counter", "Requests by path and status", requests),
            ("replies_finished_total", "counter", "Replies by why they ended", finished),
            ("prompt_tokens_total", "counter", "Prompt tokens of accepted requests", {"": self.num_prompt_tokens}),
            ("generated_tokens_total", "counter", "Tokens generated", {"": batcher.num_generated}),
            ("decode_steps_total", "counter", "Times the batch got one token each", {"": batcher.num_steps}),
            ("running", "gauge", "Replies in the batch: its size", {"": batcher.num_running}),
            ("batch_size_max", "gauge", "Replies the batch may hold", {"": batcher.limits.max_batch}),
            ("waiting", "gauge", "Replies that wait for a place", {"": batcher.num_waiting}),
        ]
        return "".join(_family(*family) for family in families)


def _family(name: str, kind: str, meaning: str, values: dict[str, int]) -> str:
    name = f"moesaic_{name}"
    samples = "".join(f"{name}{labels} {value}\n" for labels, value in values.items())
    return f"# HELP {name} {meaning}.\n# TYPE {name} {kind}\n{samples}"


class CountingRequests:
    """Middleware that counts replies to the API's requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on and count the status of its reply."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.requests[(getattr(route, "path", "other"), message["status"])] += 1
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)

"""Token ids over HTTP: our server's, and what the client makes of servers that do otherwise."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moesaic.core.errors import StageError
from moesaic.deploy.engines import Server
from moesaic.deploy.engines.completions import Completion, RequestSettings, _ask_all, complete
from moesaic.deploy.server.process import load
from moesaic.models.generation import Generated, Sampling, generate, read_stop_ids
from tests.closeness import assert_same_replies
from tests.deploy.test_server import COMPLETIONS, LIMITS, Running

PROMPTS = [[20, 21], [22, 23, 24, 25], [26]]
SETTINGS = RequestSettings(frozenset([5]), max_requests=2, reply_timeout_s=30)


@pytest.fixture(scope="module")
def parent(tiny_parent: Path) -> Iterator[Running]:
    running = Running(load(tiny_parent, "tiny", "bf16", "float32", LIMITS))
    yield running
    running.stop()


def wanted(max_tokens: int = 12) -> list[Completion]:
    return [Completion(f"add-{place}", tuple(prompt), max_tokens, 0.0, place) for place, prompt in enumerate(PROMPTS)]


def of(running: Running) -> Server:
    return Server(running.url, "tiny", None, Path("log"), "moesaic")


def test_replies_are_the_models_own_token_by_token(parent: Running, tiny_parent: Path) -> None:
    assert read_stop_ids(tiny_parent) == {5}
    found = dict(complete(of(parent), wanted(), SETTINGS))
    expected = generate(parent.served.model, PROMPTS, Sampling(12, frozenset([5])), 3)
    tokens = [found[place].token_ids for place in range(3)]
    assert_same_replies(parent.served.model, PROMPTS, tokens, [one.token_ids for one in expected])
    assert all(found[place].truncated == (tokens[place][-1] != 5) for place in range(3))


def test_every_choice_names_its_tokens_if_it_is_asked_to(parent: Running) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS, "max_tokens": 4, "n": 2, "temperature": 1, "skip_special_tokens": False}
    plain = parent.post(COMPLETIONS, **body).json()
    assert all("token_ids" not in choice for choice in plain["choices"])
    reply = parent.post(COMPLETIONS, **body, return_token_ids=True).json()
    assert len(reply["choices"]) == 6
    for choice in reply["choices"]:
        assert parent.served.tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert sum(len(choice["token_ids"]) for choice in reply["choices"]) == reply["usage"]["completion_tokens"]
    refused = parent.post(COMPLETIONS, prompt="w1", stream=True, return_token_ids=True)
    assert refused.status_code == 400 and "not served in a stream" in refused.json()["error"]["message"]


def test_a_request_that_is_refused_names_the_problem(parent: Running) -> None:
    with pytest.raises(StageError, match=r"did not reply to 'add-\d': .*do not fit the context"):
        list(complete(of(parent), wanted(max_tokens=600), SETTINGS))


class Careless(BaseHTTPRequestHandler):
    """Replies with what the class says."""

    choice: ClassVar[dict[str, Any]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(
            {"id": "1", "object": "text_completion", "model": "m", "created": 1, "choices": [self.choice]}
        )
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"finish_reason": "stop"}, r"ended \(stop\) with token ids \[\]"),
        ({"finish_reason": "stop", "token_ids": [7, 8]}, r"ended \(stop\) with token ids \[7, 8\]"),
    ],
)
def test_replies_without_all_their_tokens_are_refused(choice: dict[str, Any], said: str) -> None:
    handler = type("Handler", (Careless,), {"choice": {"index": 0, "text": "x", **choice}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as careless:
        threading.Thread(target=careless.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{careless.server_port}", "m", None, Path("log"))
        with pytest.raises(StageError, match=said):
            list(complete(server, wanted(), SETTINGS))
        careless.shutdown()


def test_no_request_outlives_the_first_failure() -> None:
    """It would find its client closed, and might leave a connection behind."""
    held = threading.Event()

    class OneAnswersBadly(Careless):
        choice: ClassVar = {"index": 0, "text": "x", "finish_reason": "stop", "token_ids": [7]}

        def do_POST(self) -> None:
            if turns.pop():
                held.wait(20)
            super().do_POST()

    async def ask() -> int:
        with pytest.raises(StageError, match="ended"):
            await _ask_all(server, wanted(), SETTINGS, asyncio.Queue())
        return len(asyncio.all_tasks())

    turns = [True, False]
    with ThreadingHTTPServer(("127.0.0.1", 0), OneAnswersBadly) as careless:
        threading.Thread(target=careless.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{careless.server_port}", "m", None, Path("log"))
        assert asyncio.run(ask()) == 1
        held.set()
        careless.shutdown()


def test_a_truncated_reply_needs_no_end() -> None:
    handler = type(
        "Handler", (Careless,), {"choice": {"index": 0, "text": "", "finish_reason": "length", "token_ids": [7]}}
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as careless:
        threading.Thread(target=careless.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{careless.server_port}", "m", None, Path("log"))
        found = dict(complete(server, wanted(), SETTINGS))
        careless.shutdown()
    assert found == {place: Generated((7,), True) for place in range(3)}

"""The server as clients see it: a real socket, the real batcher, a tiny parent and its child."""

import concurrent.futures
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.command_line.main import main
from moesaic.data.chat import render_conversation
from moesaic.data.verifiers import split_reply
from moesaic.deploy.server.app import create_app
from moesaic.deploy.server.batching import Batcher
from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.process import StoppingServer, bind, load
from moesaic.deploy.server.protocol import ChatRequest, parse
from moesaic.deploy.server.served_model import ServedModel
from moesaic.models.architecture import Architecture, Block
from moesaic.models.generation import Sampling, generate
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig
from tests.closeness import assert_decided, assert_same_replies

LIMITS = ServerLimits(max_context=10**6, max_batch=8, max_waiting=400, max_body_bytes=20_000)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CACHE_TIE = 1e-3
"""Of the largest logit: what it may change by if rounding puts one element of the FP8 cache a step (6 %) further."""


@pytest.fixture(scope="session")
def child(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    blocks = Architecture.of([Block(8, 2, 64, 8), Block(5, 1, 64, 16), Block(2, 2, 64, 8), Block(8, 2, 64)]).blocks
    directory = tmp_path_factory.mktemp("served")
    paths = {name: directory / name for name in ("ranking", "architecture", "output", "scratch")}
    for path in paths.values():
        path.mkdir()
    candidates = {"puzzle": {"blocks": [block.as_config() for block in blocks]}}
    (paths["ranking"] / "ranking.json").write_text(json.dumps({"layers": [{"order": list(range(8))}] * 4}))
    (paths["architecture"] / "architecture.json").write_text(json.dumps({"candidates": candidates, "skipped": {}}))
    prune_model.run(PruneModelConfig(candidate="puzzle"), parent=tiny_parent, **paths)
    return paths["output"]


class Running:
    """A server in a thread, and a client of it."""

    def __init__(self, served: ServedModel, stop_within_s: float = 20) -> None:
        self.served, self.batcher = served, Batcher(served.model, served.limits)
        listener, ready = bind("127.0.0.1", 0), threading.Event()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = StoppingServer(create_app(served, self.batcher), self.batcher, stop_within_s, ready.set)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        assert ready.wait(30)
        self.client = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=300))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "tiny", **body})

    def chat(self, content: str = "w3 w1 w4", **body: Any) -> httpx.Response:
        return self.post(CHAT, messages=[{"role": "user", "content": content}], **body)

    def metrics(self) -> dict[str, int]:
        lines = self.client.get("/metrics").text.splitlines()
        return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def begin_stop(self) -> None:
        self._server.handle_exit(signal.SIGTERM, None)

    def stop(self) -> None:
        if not self._server.should_exit:
            self.begin_stop()
        self._thread.join(30)
        self.client.close()
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def parent(tiny_parent: Path) -> Iterator[Running]:
    running = Running(load(tiny_parent, "tiny", "bf16", "float32", LIMITS))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def pruned(child: Path) -> Iterator[Running]:
    running = Running(load(child, "tiny", "fp8_unit", "float32", LIMITS))
    yield running
    running.stop()


@pytest.fixture(params=["parent", "pruned"])
def server(request: pytest.FixtureRequest) -> Running:
    running: Running = request.getfixturevalue(request.param)
    return running


def events(response: httpx.Response) -> list[Any]:
    """The chunks of a stream that ended as it should."""
    found = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def test_greedy_completions_are_the_models_own(server: Running) -> None:
    """All at once through HTTP, against one at a time through ``generate``."""
    prompts = [[20 + place, *range(30, 30 + 3 * place)] for place in range(8)]
    shown = {"skip_special_tokens": False, "return_token_ids": True}
    reply = server.post(COMPLETIONS, prompt=prompts, max_tokens=12, temperature=0, **shown).json()
    sampling = Sampling(12, server.served.stop_ids)
    alone = [generate(server.served.model, [prompt], sampling, 1)[0].token_ids for prompt in prompts]
    tokens = [choice["token_ids"] for choice in reply["choices"]]
    assert_same_replies(server.served.model, prompts, tokens, alone, tie=CACHE_TIE)
    assert [choice["text"] for choice in reply["choices"]] == [server.served.tokenizer.decode(ids) for ids in tokens]
    ends = ["stop" if ids[-1] in server.served.stop_ids else "length" for ids in tokens]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ends
    assert reply["usage"] == {
        "prompt_tokens": sum(map(len, prompts)),
        "completion_tokens": sum(map(len, tokens)),
        "total_tokens": sum(map(len, [*prompts, *tokens])),
    }


@pytest.mark.parametrize("effort", ["low", "high"])
def test_a_chat_reply_is_what_the_model_says_to_the_rendered_prompt(server: Running, effort: str) -> None:
    messages = [{"role": "user", "content": "w3 w1"}, {"role": "assistant", "content": "w4"}]
    messages += [{"role": "user", "content": "w1 w5"}]
    body = {"messages": messages, "max_tokens": 60, "temperature": 0}
    reply = server.post(CHAT, reasoning_effort=effort, **body).json()
    assert (
        server.post(CHAT, chat_template_kwargs={"reasoning_effort": effort}, **body).json()["usage"] == reply["usage"]
    )
    prompt = render_conversation(messages, server.served.tokenizer, effort)
    (alone,) = generate(server.served.model, [prompt], Sampling(60, server.served.stop_ids), 1)
    assert_decided(server.served.model, prompt, alone.token_ids)
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (len(prompt), alone.num_tokens)
    message = reply["choices"][0]["message"]
    said = server.served.tokenizer.decode(alone.token_ids)
    if not alone.truncated:
        assert message["content"] == split_reply(said).final
    assert set((message["reasoning_content"] or "").split()) <= set(said.split())


def test_a_stream_says_what_the_whole_reply_says(server: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 60, "temperature": 1, "seed": 7, "n": 2, "ignore_eos": True}
    whole = server.chat(**body).json()
    chunks = events(server.chat(stream=True, stream_options={"include_usage": True}, **body))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 120
    for index, choice in enumerate(whole["choices"]):
        mine = [one for chunk in chunks[:-1] for one in chunk["choices"] if one["index"] == index]
        deltas = [one["delta"] for one in mine]
        assert deltas[0]["role"] == "assistant"
        for part in ("content", "reasoning_content"):
            assert "".join(delta.get(part, "") for delta in deltas) == (choice["message"][part] or "")
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == ["length"]
    assert all("usage" not in chunk for chunk in events(server.chat(stream=True, max_tokens=2)))


def test_a_stop_text_ends_the_text_before_it(parent: Running) -> None:
    body: dict[str, Any] = {"prompt": [30, 31], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    words = parent.post(COMPLETIONS, **body).json()["choices"][0]["text"].split()
    stop = words[5]
    for stream in (False, True):
        reply = parent.post(COMPLETIONS, stop=[stop], stream=stream, **body)
        if stream:
            choices = [chunk["choices"][0] for chunk in events(reply)]
            text, finish = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
        else:
            text, finish = (reply.json()["choices"][0][key] for key in ("text", "finish_reason"))
        assert (text.split(), finish) == (words[: words.index(stop)], "stop")


def test_seeds_decide_and_choices_differ(parent: Running) -> None:
    def draw(**body: Any) -> list[str]:
        reply = parent.post(COMPLETIONS, prompt="w1 w2", max_tokens=12, ignore_eos=True, **body).json()
        return [choice["text"] for choice in reply["choices"]]

    assert draw(n=3, seed=1) == draw(n=3, seed=1)
    assert len(set(draw(n=3, seed=1) + draw(n=1, seed=2))) == 4
    assert draw() != draw()


def test_200_clients_at_once_and_the_counts_agree(parent: Running) -> None:
    before = parent.metrics()

    def one(place: int) -> dict[str, int]:
        body: dict[str, Any] = {"max_tokens": 1 + place % 7, "ignore_eos": place % 2 == 0}
        if place % 3:
            reply = parent.chat(f"w{place % 40}", **body)
            assert reply.status_code == 200, reply.text
            return dict(reply.json()["usage"])
        chunks = events(parent.chat(f"w{place % 40}", stream=True, stream_options={"include_usage": True}, **body))
        return dict(chunks[-1]["usage"])

    with concurrent.futures.ThreadPoolExecutor(200) as clients:
        usages = list(clients.map(one, range(200)))
    after = parent.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['moesaic_requests_total{path="/v1/chat/completions",status="200"}'] == 200
    assert grown["moesaic_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert grown["moesaic_generated_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    assert grown["moesaic_decode_steps_total"] < grown["moesaic_generated_tokens_total"] / 3, "batches were shared"
    finished = [count for name, count in grown.items() if name.startswith("moesaic_replies_finished_total")]
    assert sum(finished) == 200
    assert after["moesaic_running"] == after["moesaic_waiting"] == 0


def test_the_openapi_description_and_the_model_list_are_there(parent: Running) -> None:
    (entry,) = parent.client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["max_model_len"]) == ("tiny", 512)
    described = parent.client.get("/openapi.json").json()
    assert set(described["paths"]) == {*("/health", "/metrics", "/v1/models", "/v1/models/{model}", CHAT, COMPLETIONS)}
    assert "reasoning_effort" in described["components"]["schemas"]["ChatRequest"]["properties"]


USER = [{"role": "user", "content": "w1"}]
REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other", "messages": USER}, 404, "model"),
    ({"messages": USER}, 400, "model"),
    ({"model": "tiny"}, 400, "messages"),
    ({"model": "tiny", "messages": []}, 400, "messages"),
    ({"model": "tiny", "messages": [{"role": "wizard", "content": "w1"}]}, 400, "messages.0.role"),
    ({"model": "tiny", "messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"model": "tiny", "messages": USER, "temperature": 3}, 400, "temperature"),
    ({"model": "tiny", "messages": USER, "temperature": "1"}, 400, "temperature"),
    ({"model": "tiny", "messages": USER, "top_p": 0}, 400, "top_p"),
    ({"model": "tiny", "messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    ({"model": "tiny", "messages": USER, "max_tokens": 512}, 400, "messages"),
    ({"model": "tiny", "messages": USER, "max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
    ({"model": "tiny", "messages": USER, "max_tokens": 5, "min_tokens": 6}, 400, "min_tokens"),
    ({"model": "tiny", "messages": [{"role": "user", "content": "w1 " * 600}]}, 400, "messages"),
    ({"model": "tiny", "messages": USER, "n": 17}, 400, "n"),
    ({"model": "tiny", "messages": USER, "stop": ""}, 400, "stop"),
    ({"model": "tiny", "messages": USER, "seed": 2**63}, 400, "seed"),
    ({"model": "tiny", "messages": USER, "reasoning_effort": "none"}, 400, "reasoning_effort"),
    ({"model": "tiny", "messages": USER, "logprobs": True}, 400, "logprobs"),
    ({"model": "tiny", "messages": USER, "tools": [{"type": "function"}]}, 400, "tools"),
    ({"model": "tiny", "messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"model": "tiny", "messages": [{"role": "tool", "content": "w1"}]}, 400, "messages.0.role"),
    ({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    ({"model": "tiny", "messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]}, 400, "messages.1.tool_calls"),
    ({"model": "tiny", "messages": [{**USER[0], "reasoning": "w2"}]}, 400, "messages.0"),
    ({"model": "tiny", "messages": USER, "modalities": ["text", "audio"]}, 400, "modalities"),
    ({"model": "tiny", "messages": USER, "verbosity": "high"}, 400, "verbosity"),
    ({"model": "tiny", "messages": USER, "prediction": {"type": "content", "content": "w1"}}, 400, "prediction"),
    ({"model": "tiny", "messages": USER, "function_call": {"name": "look"}}, 400, "function_call"),
    ({"model": "tiny", "messages": USER, "store": True}, 400, "store"),
    ({"model": "tiny", "messages": USER, "frequency_penalty": 1}, 400, "frequency_penalty"),
    ({"model": "tiny", "messages": USER, "invented": 1}, 400, "invented"),
    ({"model": "tiny", "prompt": ""}, 400, "prompt"),
    ({"model": "tiny", "prompt": "  "}, 400, "prompt"),
    ({"model": "tiny", "prompt": []}, 400, "prompt"),
    ({"model": "tiny", "prompt": [1, "w1"]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [64]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [-1]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [[1], []]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [[1]] * 9, "n": 2}, 400, "n"),
]


@pytest.mark.parametrize(("body", "status", "param"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name(
    parent: Running, body: dict[str, Any], status: int, param: str | None
) -> None:
    reply = parent.client.post(COMPLETIONS if "prompt" in body else CHAT, json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.match(param or "", error["param"]) and error["message"]


RAW: list[tuple[bytes, str, int]] = [
    (b"", "application/json", 400),
    (b"[" * 100_000, "application/json", 413),
    (b"[" * 10_000, "application/json", 400),
    (b"\xff\xfe", "application/json", 400),
    (b"NaN", "application/json", 400),
    (b'{"model": "tiny", "prompt": "w1", "temperature": NaN}', "application/json", 400),
    (b'{"model": "tiny", "prompt": "\\ud800"}', "application/json", 400),
    (b'{"model": "tiny", "prompt": [1' + b"0" * 5000 + b"]}", "application/json", 400),
    (b'{"model": "tiny", "prompt": "w1"}', "text/plain", 415),
    (b'{"model": "tiny", "prompt": "w1"}', "", 415),
]


@pytest.mark.parametrize(("content", "kind", "status"), RAW)
def test_bodies_that_are_no_requests_are_refused(parent: Running, content: bytes, kind: str, status: int) -> None:
    reply = parent.client.post(COMPLETIONS, content=content, headers={"content-type": kind} if kind else {})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(parent: Running) -> None:
    for reply, status in ((parent.client.get("/v1/none"), 404), (parent.client.get(CHAT), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PARAMETERS = {
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": st.text(max_size=20)}
        ),
        min_size=1,
        max_size=3,
    ),
    "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 70), max_size=4),
    "max_tokens": st.integers(-1, 4),
    "min_tokens": st.integers(-1, 4),
    "temperature": st.floats(-1, 3) | st.sampled_from([0.0, 1e-300, 2.0]),
    "top_p": st.floats(-0.1, 1.1) | st.just(5e-324),
    "seed": st.integers(),
    "n": st.integers(0, 3),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stream": st.booleans(),
    "ignore_eos": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "reasoning_effort": st.sampled_from(["low", "medium", "high", "none"]),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    good=st.fixed_dictionaries({}, optional=PARAMETERS),
    bad=st.dictionaries(st.sampled_from([*PARAMETERS, "model"]), JSON, max_size=1),
)
def test_no_request_is_answered_with_a_failure(
    parent: Running, path: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    unwanted = "prompt" if path == CHAT else "messages"
    wanted = "messages" if path == CHAT else "prompt"
    given = {wanted: USER if path == CHAT else "w1"} | {key: value for key, value in good.items() if key != unwanted}
    body = json.dumps({"model": "tiny", "max_tokens": 2, **given, **bad})
    reply = parent.client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code == 200 and (given | bad).get("stream"):
        assert all("error" not in chunk for chunk in events(reply))
    else:
        assert ("choices" if reply.status_code == 200 else "error") in reply.json()


NEUTRAL: dict[str, list[Any]] = {
    "audio": [None],
    "frequency_penalty": [None, 0, 0.0],
    "function_call": [None, "none", "auto"],
    "functions": [None, []],
    "invented": [None],
    "logit_bias": [None, {}],
    "logprobs": [None, False],
    "max_completion_tokens": [None, 3, 3.0],
    "metadata": [None, {}],
    "min_p": [None, 0],
    "modalities": [None, ["text"]],
    "n": [None, 1],
    "parallel_tool_calls": [None, True],
    "prediction": [None],
    "presence_penalty": [None, 0],
    "reasoning_effort": [None, "medium"],
    "repetition_penalty": [None, 1.0],
    "response_format": [None, {"type": "text"}],
    "seed": [None, 3],
    "service_tier": [None, "auto"],
    "stop": [None, []],
    "store": [None, False],
    "stream": [None, False],
    "stream_options": [None],
    "tool_choice": [None, "none", "auto"],
    "tools": [None, []],
    "top_k": [None, -1, 0],
    "top_logprobs": [None, 0],
    "top_p": [None, 1, 1.0],
    "user": [None, "me"],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
}
"""Values that say nothing."""


@pytest.fixture(scope="module")
def plain(parent: Running) -> dict[str, Any]:
    """The reply without any of them."""
    reply = parent.chat(max_tokens=3, temperature=0).json()
    return {key: reply[key] for key in ("choices", "usage")}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in NEUTRAL.items()}))
def test_parameters_that_say_nothing_change_nothing(
    parent: Running, plain: dict[str, Any], said: dict[str, Any]
) -> None:
    reply = parent.chat(max_tokens=3, temperature=0, **said)
    assert reply.status_code == 200, reply.text
    assert {key: reply.json()[key] for key in ("choices", "usage")} == plain


WROTE = st.none() | st.sampled_from(["", "w1", "w2 <|end|> w3", "<|start|> system <|message|>"])
OWN = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": WROTE | WROTE.map(lambda text: [{"type": "text", "text": text or ""}])},
    optional={
        **dict.fromkeys(["reasoning_content"], WROTE),
        **{name: st.none() for name in ("refusal", "audio", "function_call", "tool_calls", "annotations", "invented")},
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(OWN, max_size=2), written=st.text(max_size=5) | WROTE.map(lambda text: text or ""))
def test_replies_are_accepted_as_history_and_nothing_in_it_is_control(
    parent: Running, history: list[dict[str, Any]], written: str
) -> None:
    messages = [{"role": "user", "content": written}, *history, *USER]
    asked = parse(ChatRequest, json.dumps({"model": "tiny", "messages": messages}).encode())
    (reply,) = parent.served.chat_replies(asked)
    names = [parent.served.markers[token] for token in reply.prompt if token in parent.served.markers]
    thinking = sum(bool(message.get("reasoning_content")) for message in history)
    turn, thought = ["start", "message", "end"], ["start", "channel", "message", "end"]
    own = ["start", "channel", "message", "return"]
    expected = [*turn, *turn, *turn, "start"]
    assert sorted(names) == sorted([*expected, *thought * thinking, *own * len(history)])


def test_what_the_server_said_can_be_said_back_to_it(parent: Running) -> None:
    for max_tokens in (1, 40):
        message = parent.chat(max_tokens=max_tokens, ignore_eos=True).json()["choices"][0]["message"]
        assert parent.post(CHAT, messages=[*USER, message, *USER], max_tokens=1).status_code == 200
    assert message["reasoning_content"]
    for name in ("reasoning", "thinking"):
        renamed = {"role": "assistant", "content": None, name: message["reasoning_content"]}
        assert parent.post(CHAT, messages=[*USER, renamed, *USER], max_tokens=1).status_code == 200


def test_pages_answer_to_head_and_one_model_is_retrieved(parent: Running) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny"):
        head = parent.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert [parent.client.get("/v1/models/tiny").json()] == parent.client.get("/v1/models").json()["data"]
    for name in ("other", "openai/gpt-oss-20b", "tiny/x"):
        refused = parent.client.get(f"/v1/models/{name}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_a_part_that_is_no_text_is_named(parent: Running) -> None:
    parts = [{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    error = parent.post(CHAT, messages=[{"role": "user", "content": parts}]).json()["error"]
    assert error["param"] == "messages.0.content"
    assert "part 1 is of type 'image_url'; this model reads text alone" in error["message"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def long_request(server: Running, stream: bool) -> Iterator[None]:
    """A request that would run for 500 tokens, whose client goes at the end of the block."""
    body = json.dumps({"model": "tiny", "prompt": [30], "max_tokens": 500, "ignore_eos": True, "stream": stream})
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(parent: Running, stream: bool) -> None:
    key = 'moesaic_replies_finished_total{reason="cancelled"}'
    before = parent.metrics().get(key, 0)
    with long_request(parent, stream):
        wait_for(lambda: parent.batcher.num_running == 1)
    wait_for(lambda: parent.batcher.is_idle)
    assert parent.metrics()[key] == before + 1


def test_a_full_queue_says_when_to_come_back(tiny_parent: Path) -> None:
    limits = ServerLimits(max_context=512, max_batch=1, max_waiting=1)
    running = Running(load(tiny_parent, "tiny", "bf16", "float32", limits))
    with long_request(running, True), long_request(running, True):
        wait_for(lambda: (running.batcher.num_running, running.batcher.num_waiting) == (1, 1))
        reply = running.chat(max_tokens=1)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert reply.json()["error"]["code"] == "queue_full"
    wait_for(lambda: running.batcher.is_idle)
    assert running.chat(max_tokens=1).status_code == 200
    running.stop()


def test_a_stopping_server_finishes_what_it_has(tiny_parent: Path) -> None:
    running = Running(load(tiny_parent, "tiny", "bf16", "float32", LIMITS))
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        reply = clients.submit(running.chat, max_tokens=300, ignore_eos=True)
        wait_for(lambda: running.batcher.num_running == 1)
        running.begin_stop()
        refused = running.chat(max_tokens=1)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert running.client.get("/health").status_code == 503
        assert reply.result().json()["usage"]["completion_tokens"] == 300
    running.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url + "/health")


def test_a_stop_is_not_put_off_beyond_its_time(tiny_parent: Path) -> None:
    running = Running(load(tiny_parent, "tiny", "bf16", "float32", LIMITS), stop_within_s=0)
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        whole = clients.submit(running.post, COMPLETIONS, prompt=[30], max_tokens=500, ignore_eos=True)
        stream = clients.submit(running.post, COMPLETIONS, prompt=[30], max_tokens=500, ignore_eos=True, stream=True)
        wait_for(lambda: running.batcher.num_running == 2)
        running.begin_stop()
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "stopping")
        *_, last = [line for line in stream.result().text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    running.stop()


def test_the_command_serves_until_it_is_told_to_stop(tiny_parent: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "moesaic.command_line.main",
        "serve",
        str(tiny_parent),
        "--port",
        "0",
    ]
    process = subprocess.Popen([*command, "--name", "mine"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found, line
        assert httpx.get(found[1] + "/models").json()["data"][0]["id"] == "mine"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content", "the chat template refuses"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "the chat template leaves out message 1, of the user"),
        ("{{ raise_exception('no users') }}", "no users"),
    ],
)
def test_a_template_that_no_question_gets_through_is_not_served(
    tiny_parent: Path, tmp_path: Path, template: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_parent, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(template)
    assert main(["serve", str(model), "--port", "0"]) == 2
    assert message in capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_serve(
    tiny_parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert main(["serve", str(tiny_parent), "--port", "0", "--kv-cache-dtype", "fp8"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tiny_parent), "--port", str(taken.getsockname()[1])]) == 2
    said = capsys.readouterr().err
    assert "k_scale" in said and "cannot serve at 127.0.0.1 port" in said

"""Servers that answer otherwise than the API: one line with address, status and what to do, and no secret in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.core.errors import ConfigError, MoesaicError, StageError
from moesaic.deploy.engines import Server, ServerSpec, started_server
from moesaic.deploy.engines.completions import Completion, RequestSettings, complete
from tests.odd_answers import KEY, ODD, Answer, OddServer, odd_server

WANTED = [Completion("add-0", (20, 21), 4, 0.0, 0)]
SETTINGS = RequestSettings(frozenset([5]), max_requests=1, reply_timeout_s=20)
LATER = ("502 page", "cut body")
"""What a server may do while it starts: it is asked again until the time is up."""


@pytest.fixture(scope="module")
def odd() -> Iterator[OddServer]:
    with odd_server() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, odd: OddServer) -> None:
    monkeypatch.setattr("moesaic.deploy.engines.completions._MAX_RETRIES", 0)
    monkeypatch.setattr("moesaic.deploy.engines.completions._LOOK_AFTER_S", 0.01)
    monkeypatch.setenv("MOESAIC_SERVER_URL_MODEL", odd.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    odd.asked.clear()


def start(directory: Path, timeout_s: float = 20) -> Server:
    spec = ServerSpec("model", directory, "bf16", "float32", max_requests=1, max_cache_tokens=100)
    with started_server("running", spec, directory / "log", timeout_s) as server:
        return server


def assert_explained(failure: BaseException, odd: OddServer) -> None:
    said = str(failure)
    assert odd.url in said and KEY not in said and len(said) < 900
    if "cut body" not in said and odd.answer.status != 200:
        assert str(odd.answer.status) in said


@pytest.mark.parametrize("kind", ODD)
def test_the_list_of_models(kind: str, odd: OddServer, tmp_path: Path) -> None:
    odd.answer = ODD[kind]
    with pytest.raises(MoesaicError) as failed:
        start(tmp_path, timeout_s=0.3 if kind in LATER else 20)
    assert_explained(failed.value, odd)
    assert isinstance(failed.value, StageError if kind in (*LATER, "no text") else ConfigError)
    assert kind in LATER or len(odd.asked) == 1, "a refusal for good is not asked for again"
    assert odd.asked[0][2]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("kind", ODD)
def test_a_completion(kind: str, odd: OddServer) -> None:
    odd.answer = ODD[kind]
    server = Server(odd.url, "m", None, Path("log"), key=KEY)
    with pytest.raises(MoesaicError) as failed:
        list(complete(server, WANTED, SETTINGS))
    assert_explained(failed.value, odd)
    assert len(odd.asked) == 1 and odd.asked[0][2]["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(server)


@pytest.mark.parametrize(
    "choices", [[], [{}, {}], [None], {"0": {}}, [{"token_ids": ["a"]}], [{"token_ids": 7}], [{"token_ids": [1.5]}]]
)
def test_a_completion_of_another_form(choices: object, odd: OddServer) -> None:
    body = json.dumps({"id": "1", "choices": choices}).encode()
    odd.answer = Answer(200, body, {"content-type": "application/json"})
    with pytest.raises(MoesaicError, match="completion in the OpenAI API's form was expected"):
        list(complete(Server(odd.url, "m", None, Path("log")), WANTED, SETTINGS))


@pytest.mark.parametrize("text", ["vllm:request_success_total", "vllm:request_success_total{} NaN", "<html>", "\x00"])
def test_counters_that_are_none_are_left_out(text: str, odd: OddServer) -> None:
    odd.answer = Answer(200, text.encode())
    assert Server(odd.url, "m", None, Path("log")).counts() == {}


@pytest.mark.parametrize(
    "url", ["host:8000", "ftp://host", "http://", "http://me:secret@host", "http://host:port", "http://host/?key=1"]
)
def test_what_is_no_address_of_a_server(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_SERVER_URL_MODEL", url)
    with pytest.raises(ConfigError, match=r"MOESAIC_SERVER_URL_MODEL is .* an address like") as failed:
        start(tmp_path)
    assert "secret" not in str(failed.value)

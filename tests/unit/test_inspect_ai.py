"""inspect-ai's surroundings: pins, log, and what servers must be asked for. It really runs in the stages' test."""

import re
from pathlib import Path
from typing import Any

import pytest

from moesaic.engines.aiperf.environment import AIPERF
from moesaic.engines.inspect_ai.asking import Answer, Question, Rules, _arguments, _request, read_answers
from moesaic.engines.inspect_ai.environment import INSPECT
from moesaic.engines.servers import Server
from moesaic.errors import StageError

PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([0-9][A-Za-z0-9.]*)$", re.MULTILINE)
QUESTION = Question("add-1", "add", (1, 2, 3), "1 + 2", "3", "exact_match", seeds=(11, 12))


def pins(text: str) -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in PIN.findall(text)}


def server(owner: str) -> Server:
    return Server("http://127.0.0.1:8000", "model", None, Path("log"), owner)


def sample(**changes: Any) -> dict[str, Any]:
    text = "<|channel|>final<|message|>3<|return|>"
    output = {
        "choices": [{"message": {"content": text}, "stop_reason": "stop"}],
        "usage": {"input_tokens": 3, "output_tokens": 4},
    }
    return {"id": "add-1", "epoch": 2, "output": output, "scores": {"verified": {"value": "C"}}} | changes


def test_pins_are_exact_and_verify_as_ours_do() -> None:
    lines = [line for line in INSPECT.pins.splitlines() if not line.startswith("#")]
    found, ours = pins(INSPECT.pins), pins(Path("constraints.txt").read_text())
    assert len(found) == len(lines) and {"inspect-ai", "openai"} < set(found)
    for package in ("math-verify", "latex2sympy2-extended", "sympy"):
        assert found[package] == ours[package]
    assert INSPECT.directory != AIPERF.directory


def test_a_log_becomes_answers() -> None:
    cut = sample(epoch=1, scores={"verified": {"value": "I"}})
    cut["output"] = {
        "choices": [{"message": {"content": "<|channel|>ana"}, "stop_reason": "max_tokens"}],
        "usage": {"output_tokens": 9},
    }
    text = "<|channel|>final<|message|>3<|return|>"
    assert read_answers({"status": "success", "samples": [cut, sample()]}) == {
        ("add-1", 1): Answer("add-1", 1, "<|channel|>ana", False, 9, True),
        ("add-1", 2): Answer("add-1", 2, text, True, 4, False),
    }


def test_a_run_that_is_not_whole_and_a_reply_without_its_end_are_refused() -> None:
    with pytest.raises(StageError, match=r"is 'error', not 'success': no such model"):
        read_answers({"status": "error", "error": "no such model", "samples": []})
    open_ended = sample()
    open_ended["output"]["choices"][0]["message"]["content"] = "<|channel|>final<|message|>3"
    with pytest.raises(StageError, match=r"reply to 'add-1' ended \(stop\) without a token that ends replies"):
        read_answers({"status": "success", "samples": [open_ended]})


def test_every_server_is_asked_for_the_whole_reply() -> None:
    assert server("moesaic").text_options == {"skip_special_tokens": False}
    for owner in ("vllm", "tensorrt_llm"):
        assert server(owner).text_options == {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert server("moesaic").token_options == {"return_token_ids": True}
    assert server("tensorrt_llm").token_options["detokenize"] is False
    assert server("another").token_options == server("vllm").token_options


def test_the_address_is_no_part_of_what_a_resumed_run_is_known_by(tmp_path: Path) -> None:
    rules = Rules(max_tokens=64, temperature=0.5, max_requests=7, reply_timeout_s=60)
    request = _request("child-high", [QUESTION], rules, server("moesaic").text_options)
    assert "127.0.0.1" not in str(request)
    assert request["epochs"] == 2 and request["questions"][0]["prompt_ids"] == (1, 2, 3)
    assert request["generation"]["extra_body"] == {"skip_special_tokens": False}
    arguments = _arguments(server("moesaic"), tmp_path / "request.json", rules, tmp_path / "logs")
    assert arguments[:2] == ["eval-set", "verified_replies.py"]
    assert arguments[arguments.index("--model-base-url") + 1] == "http://127.0.0.1:8000/v1"
    assert arguments[arguments.index("--model") + 1] == "openai-api-completions/moesaic/model"

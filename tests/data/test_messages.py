"""Messages in the spellings in which people keep them: the same tokens, or a refusal that names what nothing reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ArtifactError, MoesaicError
from moesaic.data.calibration import read_conversations, tokenize
from moesaic.data.chat import load_tokenizer, render_conversation
from moesaic.data.messages import REASONING, read_message

QUESTION = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w5"}
PLAIN = {"messages": [QUESTION, ANSWER | {"thinking": "w3 w4"}], "effort": "low"}


def tokens(model: Path, path: Path, row: dict[str, Any]) -> list[int]:
    path.write_text(json.dumps(row) + "\n")
    (conversation,) = read_conversations(path)
    return list(tokenize(load_tokenizer(model), conversation, 100).token_ids)


@pytest.mark.parametrize(
    "answer",
    [
        *({name: "w3 w4"} for name in REASONING),
        {"thinking": None, "reasoning_content": "w3 w4", "reasoning": "w3 w4"},
        {"reasoning": [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}]},
        {"reasoning": "w3 w4", "content": [{"type": "text", "text": "w5"}], "tool_calls": [], "refusal": None},
        {"reasoning": "w3 w4", "content": [{"type": "output_text", "text": "w5", "annotations": [], "cache": None}]},
    ],
)
@pytest.mark.parametrize("effort", ["effort", "reasoning_effort"])
def test_reasoning_under_any_name_is_the_same_tokens(
    tiny_parent: Path, tmp_path: Path, answer: dict[str, Any], effort: str
) -> None:
    row = {"messages": [QUESTION, ANSWER | answer], effort: "low"}
    expected = tokens(tiny_parent, tmp_path / "plain.jsonl", PLAIN)
    assert tokens(tiny_parent, tmp_path / "a.jsonl", row) == expected and len(expected) == 27


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PLAIN | {"metadata": {}}, "line 1: nothing reads the key 'metadata'; allowed are effort, id, messages"),
        (PLAIN | {"tools": [1]}, "nothing reads the key 'tools'"),
        (PLAIN | {"effort": "extreme"}, "effort is 'extreme'; allowed are low, medium, high"),
        (PLAIN | {"reasoning_effort": "high"}, "effort and reasoning_effort are the same thing, but differ"),
        ({"messages": [QUESTION | {"thinking": "w3"}]}, "message of the user: nothing reads the key 'thinking'"),
        ({"messages": [ANSWER | {"thoughts": "w3"}]}, "nothing reads the key 'thoughts'"),
        ({"messages": [ANSWER | {"thinking": "w3", "reasoning": "w4"}]}, "thinking and reasoning are the same thing"),
        ({"messages": [ANSWER | {"thinking": 7}]}, "got thinking = 7"),
        ({"messages": [{"from": "human", "value": "w1"}]}, "each message needs a text for role"),
        ({"messages": [QUESTION | {"role": "human"}]}, "there is no role 'human'; allowed are system"),
        ({"messages": [QUESTION | {"content": None}]}, "got content = None"),
        ({"messages": [QUESTION | {"content": [{"type": "image_url", "image_url": "x"}]}]}, "got content = "),
        ({"messages": ["w1"]}, "each message needs a text"),
        (
            {"messages": [QUESTION | {"content": [{"type": "text", "text": "w1", "cache_control": {"a": 1}}]}]},
            "got content =",
        ),
        ({"messages": [QUESTION | {"content": [{"type": "text"}]}]}, "got content ="),
        (
            {"messages": [ANSWER | {"tool_calls": [{"function": {"name": "f"}}]}]},
            "has tool_calls, which the chat template",
        ),
        ({"messages": [ANSWER | {"tool_calls": [{"id": "1"}]}]}, "each call of a tool needs a function with name"),
        ({"messages": [ANSWER | {"tool_calls": {"name": "f"}}]}, "tool_calls must be a list of calls"),
        ({"messages": [ANSWER | {"tool_calls": ["f()"]}]}, "each call of a tool needs a function"),
        (
            {"messages": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "x=1"}]}]},
            "call of f: arguments is not valid JSON",
        ),
        ({"messages": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments must be an object"),
        (
            {"messages": [ANSWER | {"tool_calls": [{"name": "f", "parameters": {}}]}]},
            "nothing reads the key 'parameters'",
        ),
        ({"messages": [ANSWER | {"tool_calls": [{"name": "f", "type": "custom"}]}]}, "is of type 'custom'"),
        (PLAIN | {"id": ["a"]}, "id must be text or a number"),
        (PLAIN | {"task": 1.5}, "task must be text or a number"),
    ],
)
def test_what_nothing_reads_is_refused(tiny_parent: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        tokens(tiny_parent, tmp_path / "a.jsonl", row)


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "look", "arguments": {"at": "<w1>", "n": 1}}},
        {"id": "c1", "index": 0, "function": {"name": "look", "arguments": '{"at": "<w1>", "n": 1}'}},
        {"name": "look", "arguments": {"at": "<w1>", "n": 1}, "type": None},
        {"id": None, "name": "look", "arguments": ' {"at":"<w1>","n":1}'},
    ],
)
def test_a_call_in_any_spelling_has_an_object_for_arguments(call: dict[str, Any]) -> None:
    (read,) = read_message({"role": "assistant", "content": None, "tool_calls": [call]}, "here")["tool_calls"]
    assert read["function"] == {"name": "look", "arguments": {"at": "<w1>", "n": 1}}
    assert read.get("id") == call.get("id")


@pytest.mark.parametrize("nothing", [None, "", "{}", {}, "null"])
def test_a_call_may_have_no_arguments(nothing: object) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": nothing}}]}
    assert read_message(message, "here")["tool_calls"][0]["function"]["arguments"] == {}


def test_an_answer_of_reasoning_alone_has_an_empty_content() -> None:
    read = read_message({"role": "assistant", "content": None, "reasoning": "w3"}, "here")
    assert read == {"role": "assistant", "thinking": "w3", "content": ""}


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(tmp_path)


def test_a_prompt_that_the_template_refuses_is_told(tiny_parent: Path) -> None:
    tokenizer = load_tokenizer(tiny_parent)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ArtifactError, match=r"the chat template refuses .*: no such role"):
        render_conversation([QUESTION], tokenizer, "low")


TEXTS = st.none() | st.sampled_from(["", "w3", "w4"]) | st.integers(0, 1)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "human"])},
    optional={key: TEXTS for key in ("content", *REASONING, "name", "reasoning_text")},
)


@settings(max_examples=800, deadline=None, derandomize=True)
@given(MESSAGES)
def test_no_text_of_a_message_is_lost(message: dict[str, Any]) -> None:
    try:
        read = read_message(message, "here")
    except MoesaicError:
        event("refused")
        return
    given_texts = {value for key, value in message.items() if key != "role" and value}
    assert {value for key, value in read.items() if key != "role" and value} == given_texts
    assert read["role"] == message["role"] and isinstance(read["content"], str)

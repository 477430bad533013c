"""Calibration sets: what is read, which tokens count as the assistant's, how sequences are batched."""

import json
from pathlib import Path

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.data.batches import TokenSequence, make_batches
from moesaic.data.calibration import Conversation, load_batches, read_conversations, tokenize
from moesaic.data.chat import load_tokenizer

QUESTION = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "thinking": "w3 w4", "content": "w5"}


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def response_text(model: Path, *messages: dict[str, str], max_tokens: int = 100) -> str:
    tokenizer = load_tokenizer(model)
    sequence = tokenize(tokenizer, Conversation(messages, "low", "here"), max_tokens)
    marked = [token for token, response in zip(sequence.token_ids, sequence.is_response, strict=True) if response]
    return str(tokenizer.decode(marked))


def test_response_is_analysis_final_and_end_token(tiny_parent: Path):
    expected = (
        "<|channel|> analysis <|message|> w3 w4 <|end|> <|start|> assistant <|channel|> final <|message|> w5 <|return|>"
    )
    assert response_text(tiny_parent, QUESTION, ANSWER) == expected


def test_every_turn_counts(tiny_parent: Path):
    plain = {"role": "assistant", "content": "w9"}
    text = response_text(tiny_parent, QUESTION, plain, QUESTION, plain)
    assert text == " ".join(["<|channel|> final <|message|> w9 <|return|>"] * 2)


def test_turns_the_template_rewrites_do_not_count(tiny_parent: Path):
    """As gpt-oss' own template: only the last turn keeps its analysis and its end token."""
    tokenizer = load_tokenizer(tiny_parent)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
        "{% elif loop.last %}{{ '<|start|>assistant<|message|>' + m.content + '<|return|>' }}"
        "{% else %}{{ '<|start|>assistant<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    messages = (QUESTION, {"role": "assistant", "content": "w7"}, QUESTION, {"role": "assistant", "content": "w8"})
    sequence = tokenize(tokenizer, Conversation(messages, None, "here"), 100)
    marked = [token for token, response in zip(sequence.token_ids, sequence.is_response, strict=True) if response]
    assert tokenizer.decode(marked) == "<|message|> w8 <|return|>"


def test_effort_reaches_the_template(tiny_parent: Path):
    tokenizer = load_tokenizer(tiny_parent)
    sequence = tokenize(tokenizer, Conversation((QUESTION, ANSWER), "high", "here"), 100)
    assert "Reasoning: high" in tokenizer.decode(list(sequence.token_ids))


def test_cut_at_max_tokens(tiny_parent: Path):
    sequence = tokenize(load_tokenizer(tiny_parent), Conversation((QUESTION, ANSWER), "low", "here"), 15)
    assert len(sequence.token_ids) == len(sequence.is_response) == 15
    assert sum(sequence.is_response) == 15 - 14, "system 6 tokens, user 6, generation prompt 2"


def test_batches_hold_every_sequence_once_within_the_limit():
    sequences = [TokenSequence((length,) * length, (True,) * length) for length in (7, 3, 5, 20, 2)]
    batches = make_batches(sequences, batch_tokens=12)
    assert [tuple(batch.token_ids.shape) for batch in batches] == [(2, 3), (1, 5), (1, 7), (1, 20)]
    assert sorted(int(row[0]) for batch in batches for row in batch.token_ids) == [2, 3, 5, 7, 20]
    assert batches[0].is_token.tolist() == [[True, True, False], [True, True, True]]
    assert not batches[0].is_response[0, 2]


def test_max_sequences_takes_the_first(tiny_parent: Path, tmp_path: Path):
    data = write_rows(tmp_path / "a.jsonl", *({"messages": [QUESTION, ANSWER]} for _ in range(5)))
    batches = load_batches(data, tiny_parent, max_sequences=3, max_tokens=100, batch_tokens=1000)
    assert sum(len(batch.token_ids) for batch in batches) == 3


def test_a_directory_holds_exactly_one_set(tmp_path: Path):
    data = write_rows(tmp_path / "a.jsonl", {"messages": [QUESTION]})
    assert read_conversations(tmp_path) == read_conversations(data)
    write_rows(tmp_path / "b.jsonl", {"messages": [QUESTION]})
    with pytest.raises(ArtifactError, match=r"exactly one; found a\.jsonl, b\.jsonl"):
        read_conversations(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n{broken\n', "line 2 is not valid JSON"),
        ('{"prompt": "x"}\n', "line 1 has no conversation"),
        ("[1, 2]\n", "line 1 must be a JSON object"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: each message needs a text for role and for content"),
    ],
)
def test_bad_sets_name_the_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_conversations(tmp_path)


def test_missing_set(tmp_path: Path):
    with pytest.raises(ArtifactError, match="no such file or directory"):
        read_conversations(tmp_path / "nowhere")


def test_a_conversation_the_template_refuses_names_its_line(tiny_parent: Path):
    tokenizer = load_tokenizer(tiny_parent)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ArtifactError, match=r"set\.jsonl, line 3.*no such role"):
        tokenize(tokenizer, Conversation((QUESTION,), None, "set.jsonl, line 3"), 10)

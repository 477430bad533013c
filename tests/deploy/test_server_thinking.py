"""Our server with models that think within tags, as Qwen3 does: what the template gets, and how replies are split."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moesaic.data.chat import decode_reply
from moesaic.data.verifiers import split_reply
from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.process import load
from moesaic.deploy.server.protocol import ChatRequest
from moesaic.deploy.server.served_model import ServedModel

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' }}"
    "{% if m.reasoning_content %}{{ '<think> ' + m.reasoning_content + ' </think> ' }}{% endif %}"
    "{{ m.content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant' }}{% endif %}"
)
WORDS = ["?", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "system", "user", "assistant", "a", "b", "c"]
LIMITS = ServerLimits(max_context=128)


@pytest.fixture(scope="module")
def directory(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("thinks") / "model"
    shutil.copytree(tiny_qwen3, copy, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    return copy


@pytest.fixture(scope="module")
def served(directory: Path) -> ServedModel:
    return load(directory, "tiny", "bf16", "float32", LIMITS)


def ask(served: ServedModel, *messages: dict[str, str], **options: Any) -> Any:
    (reply,) = served.chat_replies(ChatRequest(model="tiny", messages=list(messages), **options))
    return reply


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think> a b </think> c <|im_end|>", "c", "a b"),
        ("<think> </think> c <|im_end|>", "c", None),
        ("a b <|im_end|>", "a b", None),
        ("<think> a", None, "a"),
        ("<think> a </think>", "", "a"),
        ("<think> a </think> b <think> c <|im_end|>", "b <think> c", "a"),
    ],
)
def test_a_reply_is_split_as_it_is_graded(
    served: ServedModel, text: str, content: str | None, reasoning: str | None
) -> None:
    reply = ask(served, {"role": "user", "content": "a"}, max_tokens=64)
    ids = [WORDS.index(word) for word in text.split()]
    pieces = [piece for token in ids for piece in reply.take(token).pieces] + reply._writer.finish()
    shown = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")}
    kinds = {piece.kind for piece in pieces}
    assert shown["content"] == (content or "") and ("content" in kinds) == (content is not None)
    assert shown["reasoning"] == (reasoning or "")
    if text.endswith("<|im_end|>"):
        graded = split_reply(decode_reply(ids, served.tokenizer))
        assert (graded.final, graded.analysis or None) == (content, reasoning)


def test_the_template_gets_its_own_names(served: ServedModel) -> None:
    """The system's message stays one, and reasoning is given as the template calls it."""
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    turns += [{"role": "assistant", "content": "c", "reasoning": "a"}, {"role": "user", "content": "b"}]
    prompt = " ".join(WORDS[token] for token in ask(served, *turns).prompt)
    assert prompt == (
        "<|im_start|> system a <|im_end|> <|im_start|> user b <|im_end|> "
        "<|im_start|> assistant <think> a </think> c <|im_end|> <|im_start|> user b <|im_end|> <|im_start|> assistant"
    )


def test_a_template_may_open_the_tag(served: ServedModel) -> None:
    tokenizer = served.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.chat_template = TEMPLATE.replace("<|im_start|> assistant'", "<|im_start|> assistant <think>'")
    try:
        reply = ask(served, {"role": "user", "content": "<think> a"}, stop=["b"])
    finally:
        tokenizer.chat_template = TEMPLATE
    events = [reply.take(WORDS.index(word)) for word in ["a", "b", "</think>", "c", "b"]]
    pieces = [piece for event in events for piece in event.pieces]
    assert [(piece.kind, piece.text) for piece in pieces if piece.text] == [
        ("reasoning", "a"),
        ("reasoning", " b"),
        ("content", "c"),
    ]
    assert events[-1].finish == "stop"

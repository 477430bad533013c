"""Calibration sets: conversations in, right-padded batches of tokens out, with the assistant's own tokens marked.

A set is a JSON-lines file; a row is ``{"messages": [...], "effort": "low" | "medium" | "high"}``, and may have an
``id`` and a ``task``; for messages see :mod:`moesaic.data.messages`. Rows are rendered with the checkpoint's chat
template. *Response tokens* are what the assistant generated: everything after the generation prompt (analysis, final
answer, end token), not what it was given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from moesaic.core.errors import ArtifactError
from moesaic.data.batches import Batch, TokenSequence, make_batches
from moesaic.data.chat import GuardedChat, TemplateError, load_tokenizer
from moesaic.data.datasets import Row, check_keys, read_rows
from moesaic.data.messages import read_effort, read_message

_KEYS = ("id", "task", "messages", "effort", "reasoning_effort")


@dataclass(frozen=True)
class Conversation:
    """One row of a calibration set."""

    messages: tuple[Mapping[str, Any], ...]
    effort: str | None
    """Reasoning effort it was held at; None leaves it to the chat template."""
    place: str
    """File and line, for messages."""


def load_batches(data: Path, model: Path, *, max_sequences: int, max_tokens: int, batch_tokens: int) -> list[Batch]:
    """Read, render, cut and batch the first ``max_sequences`` rows of a calibration set for a checkpoint.

    Raises:
        ArtifactError: if the set is missing, empty or has a bad row, or the checkpoint has no tokenizer.
    """
    conversations = read_conversations(data)[:max_sequences]
    tokenizer = load_tokenizer(model)
    return make_batches([tokenize(tokenizer, row, max_tokens) for row in conversations], batch_tokens)


def read_conversations(data: Path) -> list[Conversation]:
    """All rows of a calibration set; an ArtifactError names the line that is not a conversation."""
    return [read_conversation(row) for row in read_rows(data)]


def read_conversation(row: Row) -> Conversation:
    """One row of a calibration set; an ArtifactError says why it is none."""
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ArtifactError(f"{row.place} has no conversation; a row needs messages, each with role and content")
    check_keys(row.values, _KEYS, row.place)
    for key in ("id", "task"):
        if not isinstance(row.values.get(key), str | int | None):
            raise ArtifactError(f"{row.place}: {key} must be text or a number, found {row.values[key]!r:.200}")
    read = tuple(read_message(message, row.place) for message in messages)
    return Conversation(read, read_effort(row.values, row.place), row.place)


def tokenize(tokenizer: PreTrainedTokenizerFast, row: Conversation, max_tokens: int) -> TokenSequence:
    """Render one conversation, mark its response tokens, cut it at ``max_tokens``.

    Raises:
        TemplateError: if the chat template refuses it, or never reads a part of it.
    """
    for key in ("thinking", "tool_calls"):
        if any(message.get(key) for message in row.messages) and key not in str(tokenizer.chat_template):
            raise TemplateError(f"{row.place} has {key}, which the chat template never reads; use another template")
    try:
        chat = GuardedChat.of(row.messages, tokenizer)
        text = chat.render_whole(row.effort, prompt=False)
        spans = _response_spans(chat, row, text)
        tokens = chat.encode(text)[:max_tokens]
    except ArtifactError as refused:
        raise TemplateError(f"{row.place}: {refused}") from refused
    written = tuple(any(start <= first < stop for start, stop in spans) for _, first in tokens)
    return TokenSequence(tuple(token for token, _ in tokens), written)


def _response_spans(chat: GuardedChat, row: Conversation, text: str) -> list[tuple[int, int]]:
    """Where in ``text`` each assistant turn stands as it was generated.

    A turn counts if ``text`` begins with what was rendered when the turn was the last. Templates that rewrite earlier
    turns (gpt-oss drops their analysis) leave only the final one.
    """
    spans = []
    for index, message in enumerate(row.messages):
        if message["role"] == "assistant":
            prompt = chat.render(row.effort, prompt=True, num_messages=index)
            answered = chat.render(row.effort, prompt=False, num_messages=index + 1)
            if text.startswith(answered) and answered.startswith(prompt):
                spans.append((len(prompt), len(answered)))
    return spans

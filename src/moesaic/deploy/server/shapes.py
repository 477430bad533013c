"""The JSON of replies, whole and in chunks, for chat and for plain completions."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from moesaic.deploy.server.batching import Event


class Shape(ABC):
    """The reply to one request, which may hold several choices.

    Args:
        model: the served name.
        num_prompt_tokens: of all prompts of the request, each counted once.
        num_choices: replies.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, num_prompt_tokens: int, num_choices: int) -> None:
        self._model, self._num_prompt_tokens = model, num_prompt_tokens
        self._id, self._created = f"{self.prefix}-{uuid4().hex}", int(time.time())
        self._texts: list[dict[str, str]] = [{} for _ in range(num_choices)]
        self._finishes: list[str | None] = [None] * num_choices
        self._begun: set[int] = set()

    @abstractmethod
    def choice(self, texts: dict[str, str]) -> dict[str, Any]:
        """What a whole choice holds of its texts by kind."""

    @abstractmethod
    def deltas(self, event: Event, is_first: bool) -> Iterator[dict[str, Any]]:
        """What each chunk holds of an event's pieces; at least one for the first and for the last event."""

    def add(self, index: int, event: Event) -> None:
        """Add a choice's next event."""
        texts = self._texts[index]
        for piece in event.pieces:
            texts[piece.kind] = texts.get(piece.kind, "") + piece.text
        self._finishes[index] = event.finish

    def whole(self, num_generated: int, token_ids: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """The complete reply; with the token ids of every choice, if they are given."""
        choices = [
            {"index": index, **self.choice(texts), "finish_reason": finish, "logprobs": None}
            for index, (texts, finish) in enumerate(zip(self._texts, self._finishes, strict=True))
        ]
        for choice, ids in zip(choices, token_ids, strict=False):
            choice["token_ids"] = list(ids)
        return self._envelope(self.whole_object, choices) | {"usage": self._usage(num_generated)}

    def chunks(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks of a choice's next event; the last one of the choice says why it ends."""
        held = list(self.deltas(event, index not in self._begun))
        self._begun.add(index)
        for place, delta in enumerate(held):
            finish = event.finish if place == len(held) - 1 else None
            choice = {"index": index, **delta, "finish_reason": finish, "logprobs": None}
            yield self._envelope(self.chunk_object, [choice])

    def usage_chunk(self, num_generated: int) -> dict[str, Any]:
        """The last chunk, which has no choice."""
        return self._envelope(self.chunk_object, []) | {"usage": self._usage(num_generated)}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _usage(self, num_generated: int) -> dict[str, int]:
        prompt = self._num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": num_generated, "total_tokens": prompt + num_generated}


class ChatShape(Shape):
    """``reasoning_content`` and ``content``; null where the reply has no such part."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, texts: dict[str, str]) -> dict[str, Any]:
        """The assistant's message."""
        message = {"reasoning_content": texts.get("reasoning"), "content": texts.get("content"), "refusal": None}
        return {"message": {"role": "assistant", **message}}

    def deltas(self, event: Event, is_first: bool) -> Iterator[dict[str, Any]]:
        """One for each piece; the first names the role."""
        deltas = [
            {"reasoning_content" if piece.kind == "reasoning" else "content": piece.text} for piece in event.pieces
        ]
        if is_first:
            deltas = [{"role": "assistant", "content": ""} | (deltas[0] if deltas else {}), *deltas[1:]]
        elif event.finish is not None and not deltas:
            deltas = [{}]
        for delta in deltas:
            yield {"delta": delta}


class CompletionShape(Shape):
    """A completion's choice has its reply as ``text``."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, texts: dict[str, str]) -> dict[str, Any]:
        """The text."""
        return {"text": texts.get("text", "")}

    def deltas(self, event: Event, is_first: bool) -> Iterator[dict[str, Any]]:
        """One for each piece."""
        for piece in event.pieces:
            yield {"text": piece.text}
        if event.finish is not None and not event.pieces:
            yield {"text": ""}

"""Replies without channels as they are being written: those of Qwen3 and GLM-4.5, which think within tags.

A reply is ``<think>REASONING</think>ANSWER``, without the tags if it does not think, and without the first where the
chat template has it already; a marker ends it. The tags are tokens of their own. Of a whole reply, ``content`` is
``verifiers.split_reply(text).final`` and ``reasoning`` its ``analysis``, if it closes its tag once. A stop text ends
the reply only in the answer.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moesaic.deploy.server.replies import Decode, IncrementalDetokenizer, Kind, Piece, StopTextFilter


@dataclass(frozen=True)
class ThinkTags:
    """The tokens between which a model thinks."""

    opens: int
    closes: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ThinkTags | None":
        """Those of a tokenizer, if it has them."""
        vocabulary = tokenizer.get_vocab()
        tags = [vocabulary.get(tag) for tag in ("<think>", "</think>")]
        return None if None in tags else cls(*tags)

    def is_open(self, prompt: Sequence[int], decode: Decode) -> bool:
        """Whether a prompt ends with the opening tag, white space aside."""
        return self.opens in prompt[-3:] and not decode(prompt[-3:]).rpartition(decode([self.opens]))[2].strip()


class ThinkingWriter:
    """Turns a reply's tokens into pieces of content and reasoning."""

    def __init__(
        self, decode: Decode, tags: ThinkTags, markers: Container[int], stops: Sequence[str], begins_thinking: bool
    ) -> None:
        self._decode, self._tags, self._markers, self._stops = decode, tags, markers, stops
        self._open("reasoning" if begins_thinking else "content")

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._visible.stopped

    def add(self, token: int, may_stop: bool) -> list[Piece]:
        """What becomes visible with this token."""
        if token in self._markers:
            pieces = self.finish()
            self._open(self._kind)
            return pieces
        if token == self._tags.opens and self._kind == "content" and not self._has_text:
            self._open("reasoning")
            return []
        if token == self._tags.closes and self._kind == "reasoning":
            pieces = self.finish()
            self._open("content")
            return [*pieces, Piece("content", "")]
        return self._pieces(self._visible.add(self._text.add(token), may_stop))

    def finish(self) -> list[Piece]:
        """The pieces of the text that was held back."""
        if self.stopped:
            return []
        return self._pieces(self._visible.add(self._text.finish(), False)) + self._pieces(self._visible.finish())

    def _open(self, kind: Kind) -> None:
        self._kind, self._has_text = kind, False
        self._text = IncrementalDetokenizer(self._decode)
        self._visible = StopTextFilter(self._stops if kind == "content" else (), strip=True)

    def _pieces(self, text: str) -> list[Piece]:
        self._has_text = self._has_text or bool(text)
        return [Piece(self._kind, text)] if text else []

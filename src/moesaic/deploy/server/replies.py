"""From tokens to the text a client sees, piece by piece while the reply is being generated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""
Kind = Literal["text", "content", "reasoning"]

_UNFINISHED = "\ufffd"
"""What the bytes of a character that is not complete yet decode to."""
_LONGEST_CHARACTER = 8
"""Tokens after which an incomplete character is taken to be a broken one."""


@dataclass(frozen=True)
class Piece:
    """A part of a reply's visible text."""

    kind: Kind
    text: str


class Writer(Protocol):
    """Turns one reply's tokens into pieces."""

    def add(self, token: int, may_stop: bool) -> list[Piece]:
        """What becomes visible with the next token; a stop text ends the reply only where it may."""
        ...

    def finish(self) -> list[Piece]:
        """What was held back, now that no token follows."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; nothing is visible from its beginning on."""
        ...


class IncrementalDetokenizer:
    """Decodes tokens one at a time. The texts it returns make up the text of all tokens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._shown: list[int] = []
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain with this token: none before the last byte of a character."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED) and len(self._held) < _LONGEST_CHARACTER:
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """The text of an incomplete character."""
        return self._new_text() if self._held else ""

    def _new_text(self) -> str:
        """Decoded behind its predecessors, since a decoder may put a space between tokens but not before the first."""
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]


class StopTextFilter:
    """Lets text through up to a stop text, and none that may turn out to belong to one.

    Args:
        stops: texts that end the reply.
        strip: also drop white space at both ends.
    """

    def __init__(self, stops: Sequence[str], strip: bool) -> None:
        self._stops, self._strip = stops, strip
        self._pending = ""
        self._begun = False
        self.stopped = False

    def add(self, text: str, may_stop: bool) -> str:
        """What is visible for certain."""
        self._pending += text
        places = [place for stop in self._stops if (place := self._pending.find(stop)) >= 0] if may_stop else []
        if places:
            self.stopped = True
            return self._show(min(places), is_last=True)
        return self._show(len(self._pending) - self._longest_beginning(), is_last=False)

    def finish(self) -> str:
        """The text that was held back, now that none follows."""
        return self._show(len(self._pending), is_last=True)

    def _longest_beginning(self) -> int:
        """How much of the end could be the beginning of a stop text."""
        lengths = (
            length
            for stop in self._stops
            for length in range(min(len(stop) - 1, len(self._pending)), 0, -1)
            if stop.startswith(self._pending[-length:])
        )
        return max(lengths, default=0)

    def _show(self, end: int, is_last: bool) -> str:
        shown = self._pending[:end]
        if self._strip:
            shown = shown.rstrip()
            end = end if is_last else len(shown)
            shown = shown if self._begun else shown.lstrip()
        self._begun = self._begun or bool(shown)
        self._pending = "" if is_last else self._pending[end:]
        return shown


class PlainWriter:
    """A completion: all text as it is."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._text = IncrementalDetokenizer(decode)
        self._visible = StopTextFilter(stops, strip=False)

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._visible.stopped

    def add(self, token: int, may_stop: bool) -> list[Piece]:
        """What becomes visible with this token."""
        return _text_pieces(self._visible.add(self._text.add(token), may_stop))

    def finish(self) -> list[Piece]:
        """The pieces of the text that was held back."""
        if self.stopped:
            return []
        return _text_pieces(self._visible.add(self._text.finish(), False) + self._visible.finish())


def _text_pieces(text: str) -> list[Piece]:
    return [Piece("text", text)] if text else []

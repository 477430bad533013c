"""The channels of a gpt-oss reply as they are being written.

A reply is messages ``<|channel|>NAME<|message|>TEXT``, each closed by another marker. The first message of the
``final`` channel is the answer (``content``); the analysis, and any other text the model writes, is ``reasoning``, one
message per line. Of a whole reply, ``content`` is ``verifiers.split_reply(text).final``, and ``reasoning`` begins with
its ``analysis``; of one that was cut off, ``content`` is as much of the answer as there is. A stop text ends the reply
only in the answer: the reasoning is not the text that a client asks for.
"""

from collections.abc import Mapping, Sequence

from moesaic.deploy.server.replies import Decode, IncrementalDetokenizer, Kind, Piece, StopTextFilter


class ChatWriter:
    """Turns the tokens behind ``<|start|>assistant`` into pieces of content and reasoning."""

    def __init__(self, decode: Decode, markers: Mapping[int, str], stops: Sequence[str]) -> None:
        self._decode, self._markers, self._stops = decode, markers, stops
        self._channel = ""
        self._has_content = self._has_reasoning = False
        self._open("reasoning")

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._visible.stopped

    def add(self, token: int, may_stop: bool) -> list[Piece]:
        """What becomes visible with this token."""
        marker = self._markers.get(token)
        if marker is None:
            return self._show(self._text.add(token), may_stop)
        pieces = self.finish()
        if self._marker == "channel":
            self._channel = next(iter(self._header.split()), "")
        begins = marker == "message" and self._channel == "final" and not self._has_content
        self._open("content" if begins else "reasoning", marker)
        if marker == "message":
            self._channel = ""
        if begins:
            self._has_content = True
            pieces.append(Piece("content", ""))
        return pieces

    def finish(self) -> list[Piece]:
        """The pieces of the text that was held back."""
        if self.stopped:
            return []
        pieces = self._show(self._text.finish(), False)
        return pieces + self._pieces(self._visible.finish())

    def _open(self, kind: Kind, marker: str = "") -> None:
        """From here on text is of another message, or behind another marker."""
        self._kind, self._marker, self._header = kind, marker, ""
        self._text = IncrementalDetokenizer(self._decode)
        self._visible = StopTextFilter(self._stops if kind == "content" else (), strip=True)
        self._at_start = True

    def _show(self, text: str, may_stop: bool) -> list[Piece]:
        if self._marker in ("start", "channel"):  # a role, or a channel's name: not for reading
            self._header += text
            return []
        return self._pieces(self._visible.add(text, may_stop))

    def _pieces(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._kind == "reasoning":
            text = "\n" * (self._at_start and self._has_reasoning) + text
            self._has_reasoning = True
        self._at_start = False
        return [Piece(self._kind, text)]

"""What a reply says and whether it is right: the channels of a gpt-oss reply, and verifiers of final answers.

A reply is the text a model writes after ``<|start|>assistant``: messages of the form
``<|channel|>NAME<|message|>TEXT``, each closed by another marker. Reasoning goes to the ``analysis`` channel, the
answer to ``final``. Verifiers are pure: they see the final text and the expected answer and nothing else.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.errors import ConfigError

Verifier = Callable[[str, str], bool]

_MARKER = re.compile(r"<\|(\w+)\|>")


@dataclass(frozen=True)
class Reply:
    """The first message of each channel. None: the channel never appears, or its message was cut off before its end."""

    analysis: str | None
    final: str | None


def split_reply(text: str) -> Reply:
    """Read the channels of a generated reply, however malformed.

    Args:
        text: the decoded reply, markers included.
    """
    closed: dict[str, str] = {}
    channel = ""
    pieces = _MARKER.split(text)
    for position in range(1, len(pieces), 2):
        marker, content, is_closed = pieces[position], pieces[position + 1], position + 2 < len(pieces)
        if marker == "channel":
            channel = content.split()[0] if content.split() else ""
        elif marker == "message":
            if is_closed and channel:
                closed.setdefault(channel, content.strip())
            channel = ""
    return Reply(closed.get("analysis"), closed.get("final"))


def exact_match(final: str, answer: str) -> bool:
    """Whether both are the same words; runs of white space count as one space."""
    return final.split() == answer.split()


VERIFIERS: dict[str, Verifier] = {"exact_match": exact_match}


def get_verifier(name: str) -> Verifier:
    """Look a verifier up.

    Raises:
        ConfigError: if there is none of this name; the message lists those there are.
    """
    if name not in VERIFIERS:
        raise ConfigError(f"there is no verifier {name!r}; choose one of {', '.join(sorted(VERIFIERS))}")
    return VERIFIERS[name]

"""What a reply says and whether it is right: its reasoning and its answer, and verifiers of final answers.

A reply is the text a model writes after ``<|start|>assistant``: messages of the form
``<|channel|>NAME<|message|>TEXT``, each closed by another marker. Reasoning goes to the ``analysis`` channel, the
answer to ``final``. Of models without channels it is plain text, closed by ``<|im_end|>`` or the marker of the next
turn; what stands before ``</think>`` is reasoning. Verifiers are pure: they see the final text and the expected answer
and nothing else, and whatever the text is, the verdict is True or False.
"""

import json
import logging
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from moesaic.core.errors import ConfigError
from moesaic.data.markers import GUARD, MARKER

Verifier = Callable[[str, str], bool]

_LIMIT_S = 4.0
"""For reading and comparing mathematics; what takes longer is not equal."""
_AGAIN_S = 0.2
"""After this long code that goes on is interrupted again."""
_READ_CHARACTERS = 4096
"""Mathematics is looked for in this much of a reply's end."""

_CHOICES = (
    re.compile(r"\\boxed\s*\{(?:\s*\\text\s*\{)?[^A-Za-z{}\\]*([A-Z])[^A-Za-z{}\\]*\}"),
    re.compile(r"^\W*answer\W+([A-Z])\W*$", re.IGNORECASE | re.MULTILINE),
    re.compile(r"\A\W*([A-Z])\W*\Z"),
)
"""Where a letter may stand, most explicit first: a box, a line ``Answer: B``, the whole reply."""


@dataclass(frozen=True)
class Reply:
    """The first message of each channel. None: the channel never appears, or its message was cut off before its end."""

    analysis: str | None
    final: str | None


_ENDS = ("im_end", "user", "observation")
"""Markers that end a reply without channels: Qwen's, and GLM's of the next turn."""


def split_reply(text: str) -> Reply:
    """Read the channels of a generated reply, however malformed.

    Args:
        text: of ``chat.decode_reply``, so that a marker the model spelled in words is part of its answer. In text that
            somebody else decoded it would count as a control token.
    """
    closed: dict[str, str] = {}
    channel = ""
    pieces = MARKER.split(text)
    if pieces[1:2] and pieces[1] in _ENDS:
        thought, thinks, answer = pieces[0].replace(GUARD, "").rpartition("</think>")
        return Reply(thought.strip().removeprefix("<think>").strip() if thinks else None, answer.strip())
    for position in range(1, len(pieces), 2):
        marker, content, is_closed = pieces[position], pieces[position + 1], position + 2 < len(pieces)
        if marker == "channel":
            channel = content.split()[0] if content.split() else ""
        elif marker == "message":
            if is_closed and channel:
                closed.setdefault(channel, content.replace(GUARD, "").strip())
            channel = ""
    return Reply(closed.get("analysis"), closed.get("final"))


def exact_match(final: str, answer: str) -> bool:
    """Whether both are the same words; runs of white space count as one space."""
    return final.split() == answer.split()


def math(final: str, answer: str) -> bool:
    """Whether the reply's answer equals the expected one as mathematics, by math-verify: numbers, sets, expressions.

    Boxes close together are one set; otherwise the last counts. What takes longer than a few seconds is not equal. Call
    it in a process's main thread: the limit is an alarm.

    Args:
        final: the reply; its answer may be boxed, in LaTeX or plain.
        answer: what is right, or a JSON list of texts, each of which is.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says that the limit is ours
    try:
        with _time_limit():
            given = parse(final[-_READ_CHARACTERS:], parsing_timeout=None)
            expected = (parse(f"\\boxed{{{accepted}}}", parsing_timeout=None) for accepted in _accepted(answer))
            return any(verify(each, given, timeout_seconds=None) for each in expected)
    except TimeoutError:
        return False


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError inside, again and again: code that was interrupted may catch it, and go on."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not decided within {_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, _LIMIT_S, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _accepted(answer: str) -> list[str]:
    try:
        answers = json.loads(answer)
    except (ValueError, RecursionError):
        return [answer]
    if isinstance(answers, list) and answers and all(isinstance(accepted, str) for accepted in answers):
        return answers
    return [answer]


def choice(final: str, answer: str) -> bool:
    """Whether the reply chooses the expected letter; of several letters in the most explicit form the last counts."""
    for pattern in _CHOICES:
        letters = pattern.findall(final)
        if letters:
            return bool(letters[-1].upper() == answer.strip().upper())
    return False


VERIFIERS: dict[str, Verifier] = {"exact_match": exact_match, "choice": choice, "math": math}

_NEEDS = {"math": "math_verify"}
"""Packages that a verifier imports when it is called."""


def get_verifier(name: str) -> Verifier:
    """Look a verifier up.

    Raises:
        ConfigError: if there is none of this name, or it needs a package that is not installed.
    """
    if name not in VERIFIERS:
        raise ConfigError(f"there is no verifier {name!r}; choose one of {', '.join(VERIFIERS)}")
    package = _NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"verifier {name!r} needs the package {package.replace('_', '-')}; install it")
    return VERIFIERS[name]

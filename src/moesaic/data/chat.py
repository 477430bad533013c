"""A checkpoint's tokenizer and the chat template that comes with it.

What stands in a message stays text. Control tokens come from the template alone: a marker such as ``<|start|>`` that
somebody has written is guarded by a character inside it before the template is filled, so that the markers without
guard are the template's own; the text between those is encoded without control tokens, and without the guards.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import read_text
from moesaic.data.markers import GUARD, GUARDS, MARKER, guard_markers
from moesaic.models.resolved_config import CONFIG, read_config_file

PROMPT_DATE = date(2025, 8, 5)
"""What gpt-oss's chat template prints as today's date, so that a prompt is the same tokens on every day."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class TemplateError(ArtifactError):
    """A chat template cannot render a conversation."""


def load_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """Read ``tokenizer.json``; no code that comes with a checkpoint is run.

    Raises:
        ArtifactError: if the checkpoint has no tokenizer that can be read, the tokenizer no chat template, or the model
            no embedding for one of its tokens.
    """
    if not (model / "tokenizer.json").is_file():
        raise ArtifactError(f"{model} has no tokenizer.json; copy the tokenizer's files beside the weights")
    for file in _TOKENIZER_FILES:
        if (model / file).is_file():
            read_text(model / file)
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model)
    except Exception as broken:  # of files that are damaged, which raises errors of many kinds
        raise ArtifactError(f"the tokenizer of {model} cannot be read: {broken}; copy its files again") from broken
    if not tokenizer.chat_template:
        raise ArtifactError(f"{model} has no chat template; add its chat_template.jinja to the checkpoint")
    _check_vocabulary(tokenizer, model)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    """Tokens that were added to a tokenizer count only once the embedding has rows for them."""
    if not (model / CONFIG).is_file():
        return
    size: int = read_config_file(model)["vocab_size"]
    text, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= size:
        raise ArtifactError(
            f"the tokenizer of {model} has the token {text!r} with id {number}, but the model's embedding ends at "
            f"{size - 1}; give the tokenizer that it was trained with, or a model whose embedding was resized"
        )


def find_markers(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The name of every token that is a marker, such as ``channel`` for ``<|channel|>``."""
    matches = ((token, MARKER.fullmatch(text)) for text, token in tokenizer.get_vocab().items())
    return {token: match[1] for token, match in matches if match}


def render_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, effort: str
) -> list[int]:
    """Token ids of ``{"role", "content"}`` messages in the chat template, up to where the model's reply begins.

    Raises:
        TemplateError: if the template refuses them, or leaves one out.
    """
    chat = GuardedChat.of(messages, tokenizer)
    return [token for token, _ in chat.encode(chat.render_whole(effort, prompt=True))]


def decode_reply(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A reply's text whose markers are its control tokens; those that the model spelled in words are guarded."""
    control = _control(tokenizer)
    runs = ((is_control, list(run)) for is_control, run in groupby(token_ids, control.numbers.__contains__))
    texts = ((is_control, str(tokenizer.decode(run, skip_special_tokens=False))) for is_control, run in runs)
    return "".join(text if is_control else guard_markers(text) for is_control, text in texts)


def encode_reply(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what :func:`decode_reply` gave: the same where the model split its text as the tokenizer does."""
    return [token for token, _ in GuardedChat((), GUARD, tokenizer).encode(text)]


_Part = tuple[int, int | None]
"""A message, and a call in it if that is meant."""


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[_Part]:
    """What a template must not leave out: what is not the assistant's, and its calls."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" and message.get("content"):
            yield number, None
        for call, _ in enumerate(message.get("tool_calls") or ()):
            yield number, call


@dataclass(frozen=True)
class GuardedChat:
    """A conversation whose markers are guarded, to be rendered and encoded."""

    messages: tuple[Mapping[str, Any], ...]
    guard: str
    """A character that occurs nowhere else in them."""
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> "GuardedChat":
        """Guard the markers in every text of the messages, those of calls and their arguments included."""
        written = json.dumps(list(messages), ensure_ascii=False, default=str)
        guard = next((guard for guard in GUARDS if guard not in written), None)
        if guard is None:
            raise ArtifactError("the messages hold all of U+FDD0 to U+FDEF, which stand for no character; remove them")
        markers = _control(tokenizer).markers
        return cls(tuple(_guarded(dict(message), markers, guard) for message in messages), guard, tokenizer)

    def render(self, effort: str | None, *, prompt: bool, num_messages: int | None = None) -> str:
        """The template filled with the first messages, guards included.

        Args:
            effort: None leaves it to the template.
            prompt: go on to where the model's reply begins.
            num_messages: None: all.

        Raises:
            TemplateError: if the template refuses them.
        """
        values = {} if effort is None else {"reasoning_effort": effort}
        messages = [dict(message) for message in self.messages[:num_messages]]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, strftime_now=PROMPT_DATE.strftime, **values
                )
            )
        except Exception as refused:  # the template is the user's program and may raise anything
            shown = json.dumps(messages, ensure_ascii=False, default=str).replace(self.guard, "")[:200]
            raise TemplateError(f"the chat template refuses {shown}: {refused}") from refused

    def render_whole(self, effort: str | None, *, prompt: bool) -> str:
        """All messages as :meth:`render` gives them, if the template writes every question, instruction, result, call.

        One more letter in each shows it. What an assistant thought or said before, a template may leave out.

        Raises:
            TemplateError: if the template refuses the messages, or leaves a part of one out.
        """
        text, parts = self.render(effort, prompt=prompt), list(_parts(self.messages))
        if len(self._longer(parts).render(effort, prompt=prompt)) < len(text) + len(parts):
            for number, call in parts:
                if self._longer([(number, call)]).render(effort, prompt=prompt) == text:
                    where = f"message {number + 1}, of the {self.messages[number]['role']}"
                    raise TemplateError(
                        f"the chat template leaves out {where if call is None else f'call {call + 1} of {where}'}: it "
                        "has no place for it there; put it where it has, or use another template"
                    )
        return text

    def _longer(self, parts: Sequence[_Part]) -> "GuardedChat":
        messages = [copy.deepcopy(dict(message)) for message in self.messages]
        for number, call in parts:
            if call is None:
                messages[number]["content"] += "x"
            else:
                messages[number]["tool_calls"][call]["function"]["name"] += "x"
        return replace(self, messages=tuple(messages))

    def encode(self, text: str) -> list[tuple[int, int]]:
        """Every token of a rendered text, and where in it the token begins.

        Raises:
            ArtifactError: if it is no Unicode, or the tokenizer has no way to write a marker as text.
        """
        control = _control(self.tokenizer)
        tokens: list[tuple[int, int]] = []
        end = 0
        for marker in control.markers.finditer(text):
            tokens += self._encode_text(control, text[end : marker.start()], end)
            tokens.append((control.ids[marker[0]], marker.start()))
            end = marker.end()
        return tokens + self._encode_text(control, text[end:], end)

    def _encode_text(self, control: "_Control", text: str, start: int) -> list[tuple[int, int]]:
        places = [place for place, character in enumerate(text) if character != self.guard]
        return [(token, start + places[first]) for token, first in control.encode(text.replace(self.guard, ""))]


@dataclass(frozen=True)
class _Control:
    """A tokenizer's control tokens, and how to write text without them."""

    ids: Mapping[str, int]
    """By what they look like."""
    markers: re.Pattern[str]
    numbers: frozenset[int]
    """The same tokens."""
    plain: Tokenizer
    """The same tokenizer, but special tokens are text to it; of its own, as the setting is not safe among threads."""

    def encode(self, text: str) -> list[tuple[int, int]]:
        """Text as tokens and their places, none of them a control token."""
        if not text:
            return []
        tokens = self._plain(text, 0)
        if self._is_clean(tokens):
            return tokens
        tokens, end = [], 0  # the vocabulary has a marker as a word as well: it is written letter by letter
        for marker in self.markers.finditer(text):
            tokens += self._plain(text[end : marker.start()], end)
            for place in range(*marker.span()):
                tokens += self._plain(text[place], place)
            end = marker.end()
        tokens += self._plain(text[end:], end)
        if not self._is_clean(tokens):
            raise ArtifactError(f"this tokenizer cannot write {text[:100]!r} without control tokens; remove them")
        return tokens

    def _plain(self, text: str, start: int) -> list[tuple[int, int]]:
        try:
            encoding = self.plain.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as broken:
            raise ArtifactError(f"{text[:100]!r} is no Unicode text: {broken}") from broken
        return [(token, start + first) for token, (first, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _is_clean(self, tokens: Sequence[tuple[int, int]]) -> bool:
        return not any(token in self.numbers for token, _ in tokens)


@lru_cache(maxsize=4)
def _control(tokenizer: PreTrainedTokenizerBase) -> _Control:
    """What is called special, and what looks like a marker; not what stands for unknown words."""
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = special | {f"<|{name}|>": number for number, name in find_markers(tokenizer).items()}
    ids = {text: number for text, number in ids.items() if number != tokenizer.unk_token_id}
    longest_first = sorted(ids, key=len, reverse=True)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    markers = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return _Control(ids, markers, frozenset(ids.values()), plain)


def _guarded(value: Any, markers: re.Pattern[str], guard: str) -> Any:
    """The same with guards in its texts; the role of a message is the format's own word."""
    if isinstance(value, str):
        return guard_markers(value, markers, guard)
    if isinstance(value, Mapping):
        return {
            _guarded(key, markers, guard): inner if key == "role" else _guarded(inner, markers, guard)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_guarded(inner, markers, guard) for inner in value]
    return value

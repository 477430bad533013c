"""The messages of a conversation, in the spellings in which people keep them, as the chat template knows them.

A message is ``{"role", "content"}``; an assistant's may carry its reasoning, as ``thinking``, ``reasoning_content`` or
``reasoning``, and the calls of tools. Text may come in parts. A key that nothing reads is refused, not dropped.
"""

from collections.abc import Mapping
from typing import Any, get_args

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import parse_json
from moesaic.data.datasets import check_keys

REASONING = ("thinking", "reasoning_content", "reasoning")
"""Names of what an assistant thought; the first is the chat template's."""
_EFFORT = ("effort", "reasoning_effort")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {
    "assistant": {"role", "content", "tool_calls", *REASONING},
    "tool": {"role", "content", "name", "tool_call_id"},
}
_TEXT_ONLY = {"role", "content"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL = {"id", "index", "type", "function"}
_FUNCTION = {"name", "arguments"}


def read_message(message: Any, place: str) -> dict[str, Any]:
    """One message, its reasoning under the chat template's name.

    Raises:
        ArtifactError: if it is none, or has a key that nothing reads.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ArtifactError(f"{place}: each message needs a text for role and for content, got {message!r:.200}")
    role = message["role"]
    if role not in _ROLES:
        raise ArtifactError(f"{place}: there is no role {role!r}; allowed are {', '.join(_ROLES)}")
    check_keys(message, _KEYS.get(role, _TEXT_ONLY), f"{place}, message of the {role}")
    read: dict[str, Any] = {"role": role}
    if thinking := _one_of(message, REASONING, place):
        read["thinking"] = _text(thinking[1], thinking[0], place)
    calls = message.get("tool_calls") or ()
    if calls:
        read["tool_calls"] = _calls(calls, place)
    if message.get("content") is not None or not (thinking or calls):
        read["content"] = _text(message.get("content"), "content", place)
    elif thinking and not calls:
        read["content"] = ""
    return read | {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}


def read_effort(values: Mapping[str, Any], place: str) -> str | None:
    """The reasoning effort of a row; None if it has none.

    Raises:
        ArtifactError: for an effort that there is not.
    """
    found = _one_of(values, _EFFORT, place)
    if found is None:
        return None
    if found[1] not in get_args(Effort):
        raise ArtifactError(f"{place}: {found[0]} is {found[1]!r}; allowed are {', '.join(get_args(Effort))}")
    return str(found[1])


def _one_of(values: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[str, Any] | None:
    """The one of several spellings that is there, and its value; two may be there if they say the same."""
    found = {name: values[name] for name in names if values.get(name) is not None}
    if not found:
        return None
    (first, value), *others = found.items()
    for other, differing in others:
        if differing != value:
            raise ArtifactError(f"{place}: {first} and {other} are the same thing, but differ; keep one of them")
    return first, value


def _text(value: Any, key: str, place: str) -> str:
    """A text, or the texts of its parts one after the other."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if _is_text_part(part) else part for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ArtifactError(f"{place}: each message needs a text for role and for content, got {key} = {value!r:.200}")
    return "".join(texts)


def _is_text_part(part: Any) -> bool:
    """Whether it is a text and nothing else; keys that say nothing may stand beside it."""
    says = {key for key, value in part.items() if value or key == "text"} if isinstance(part, Mapping) else set()
    return says == {"type", "text"} and part["type"] in _TEXT_PARTS


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls of tools as chat templates take them: arguments are an object, which the API has as its JSON text."""
    if not isinstance(calls, list):
        raise ArtifactError(f"{place}: tool_calls must be a list of calls, got {calls!r:.200}")
    return [_call(call, place) for call in calls]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ArtifactError(f"{place}: each call of a tool needs a function with name and arguments, got {call!r:.200}")
    where = f"{place}, call of {function['name']}"
    check_keys(call, _CALL | _FUNCTION if function is call else _CALL, where)
    check_keys(function, _CALL | _FUNCTION if function is call else _FUNCTION, where)
    if call.get("type") not in (None, "function"):
        raise ArtifactError(f"{where} is of type {call['type']!r:.200}; allowed is 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments.encode() or b"{}", f"{where}: arguments")
    if not isinstance(arguments, Mapping | None):
        raise ArtifactError(f"{where}: arguments must be an object, got {arguments!r:.200}")
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments or {})}}

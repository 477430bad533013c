"""How rows of other people's data sets become conversations and problems of ours, one row at a time.

A layout names the columns it reads. A row without them is an error: it is another set. A row whose content cannot be
used here (code without a sandbox, calls of tools, no answer) is left out, with a reason that is counted.

================== ==================================================================================================
``conversations``  ours, see :mod:`moesaic.data.calibration`
``problems``       ours, see :mod:`moesaic.data.problems`
``messages``       ``messages`` of ``role`` and ``content``; reasoning in ``<think>`` tags or a key of its own
``input_output``   ``input`` (messages, or a text) and ``output``, the reply
``dapo_math_17k``  ``prompt`` (messages that ask for a last line ``Answer: ...``), ``reward_model.ground_truth``
``skywork_or1``    ``prompt``, ``ability``, ``reward_model.ground_truth``: a list as text, any entry of which is right
``nemo_gym``       ``responses_create_params.input``, ``expected_answer``, and ``options`` or the name in ``agent_ref``
``problem_answer`` ``problem`` or ``question``, and ``answer``, in mathematics
``gsm8k``          ``question``, and ``answer``, whose last line is ``#### NUMBER``
``options``        ``question``, ``options`` (a list), ``answer`` (a letter)
``choices``        ``context``, ``question``, ``choice_A`` to ``choice_D``, ``answer`` (a letter)
================== ==================================================================================================
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from moesaic.core.errors import ArtifactError
from moesaic.data.calibration import read_conversation
from moesaic.data.datasets import Row
from moesaic.data.messages import REASONING
from moesaic.data.problems import read_problem

Made = dict[str, Any]
"""A row of a calibration set or of a problem set."""
BOXED = "\n\nPut your final answer within \\boxed{}."
"""Added to questions that do not say how to answer."""
LETTER = "\n\nPut the letter of the right option within \\boxed{}."
"""Added to multiple choice."""

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
_SWITCH = re.compile(r"\s*detailed thinking (on|off)\s*", re.IGNORECASE)
"""A system prompt that switches the reasoning of other models."""
_ROLES = ("system", "user", "assistant")
_SAYS = {"role", "content", "tool_calls"}
"""Keys of a message, besides an assistant's reasoning; a row whose messages say more is left out."""
_GYM_VERIFIERS = {"mcqa": "choice", "math_with_judge": "math", "library_judge_math": "math"}
"""By the beginning of the agent's name."""


class LeftOutError(Exception):
    """This row cannot be used here; the message is the reason."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a set are read."""

    makes: Literal["conversation", "problem"]
    read: Callable[[Row], Made]


def read_row(layout: str, row: Row, task: str) -> Made:
    """One row as a conversation or a problem, with an ``id`` (of its content, unless it has one) and a ``task``.

    Args:
        layout: a name in ``LAYOUTS``.
        row: of the set.
        task: what to call it, unless the row says.

    Raises:
        LeftOutError: if it cannot be used here.
        ArtifactError: if it does not have the layout's columns.
    """
    try:
        made = LAYOUTS[layout].read(row)
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError, AttributeError) as foreign:
        if isinstance(foreign, ArtifactError):
            raise
        columns = ", ".join(sorted(map(str, row.values)))
        raise ArtifactError(
            f"{row.place} is not of the layout {layout!r} ({type(foreign).__name__}: {foreign}); its columns are "
            f"{columns}"
        ) from foreign
    digest = hashlib.sha256(json.dumps(content_of(made), sort_keys=True).encode()).hexdigest()[:16]
    return {"id": f"{task}-{digest}", "task": task} | made


def content_of(made: Made) -> list[dict[str, Any]]:
    """The messages of a conversation or of a problem's prompt."""
    messages: list[dict[str, Any]] = made["messages"] if "messages" in made else made["prompt"]
    return messages


# ---- conversations ----


def _read_ours(row: Row) -> Made:
    read_conversation(row)
    return {key: value for key, value in row.values.items() if value is not None}


def _read_messages(row: Row) -> Made:
    return _conversation(row.values["messages"], row.values.get("category"))


def _read_input_output(row: Row) -> Made:
    asked = row.values["input"]
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    system = row.values.get("system_prompt") or ""
    reply = {"role": "assistant", "content": row.values["output"]}
    return _conversation([{"role": "system", "content": system}, *turns, reply], row.values.get("category"))


def _conversation(messages: Iterable[Mapping[str, Any]], task: Any) -> Made:
    read: list[dict[str, str]] = []
    for message in messages:
        role, content = str(message["role"]), _text(message["content"] or "")
        if role not in _ROLES or message.get("tool_calls"):
            raise LeftOutError(f"has messages of the role {role}" if role not in _ROLES else "calls tools")
        understood = _SAYS.union(REASONING if role == "assistant" else ())
        if unread := [key for key, value in message.items() if value and key not in understood]:
            raise LeftOutError(f"has messages with {unread[0]}, which nothing reads")
        if role == "system" and (not content.strip() or _SWITCH.fullmatch(content)):
            continue
        text = _reply(message, content) if role == "assistant" else {"content": content}
        if not text["content"].strip() or "<think>" in text["content"]:
            raise LeftOutError("has an empty or unfinished message")
        read.append({"role": role, **text})
    if not read or read[-1]["role"] != "assistant":
        raise LeftOutError("does not end with a reply")
    return {"messages": read, **({"task": task} if isinstance(task, str) and task else {})}


def _reply(message: Mapping[str, Any], content: str) -> dict[str, str]:
    """What an assistant wrote, its reasoning from a key of its own or from tags before its answer."""
    tagged = _THOUGHT.fullmatch(content)
    found = {_text(message[key]).strip() for key in REASONING if message.get(key)}
    if tagged:
        found.add(tagged[1].strip())
    found -= {""}
    if len(found) > 1:
        raise LeftOutError("has reasoning in two places that differ")
    return {**({"thinking": found.pop()} if found else {}), "content": tagged[2] if tagged else content}


# ---- problems ----


def _read_our_problem(row: Row) -> Made:
    read_problem(row)
    return dict(row.values)


def _read_dapo(row: Row) -> Made:
    return _problem(_messages(row.values["prompt"]), str(row.values["reward_model"]["ground_truth"]), "math")


def _read_skywork(row: Row) -> Made:
    ability = row.values["ability"]
    if ability != "math":
        raise LeftOutError(f"{ability} needs a sandbox")
    accepted = ast.literal_eval(row.values["reward_model"]["ground_truth"])
    if not isinstance(accepted, list) or not accepted:
        raise ValueError(f"reward_model.ground_truth must be a list written as text, found {accepted!r}")
    answers = [str(answer) for answer in accepted]
    answer = answers[0] if len(answers) == 1 else json.dumps(answers)
    return _problem(_messages(row.values["prompt"]), answer, "math")


def _read_gym(row: Row) -> Made:
    request = row.values["responses_create_params"]
    if "_hf_question_placeholder" in row.values:
        raise LeftOutError("its question stands in another set")
    if request.get("tools"):
        raise LeftOutError("needs tools")
    verifier = _gym_verifier(row.values)
    metadata = row.values.get("metadata") or {}
    expected = row.values["expected_answer"] if "expected_answer" in row.values else metadata["expected_answer"]
    answer = str(expected).strip()
    asked = request["input"]
    messages = _messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
    if request.get("instructions"):
        messages = ({"role": "system", "content": str(request["instructions"])}, *messages)
    return _problem(messages, answer.upper() if verifier == "choice" else answer, verifier)


def _gym_verifier(row: Mapping[str, Any]) -> str:
    agent = (row.get("agent_ref") or {}).get("name")
    if agent is None:
        options = row.get("options") or (row.get("metadata") or {}).get("options")
        return "choice" if options else "math"
    for beginning, verifier in _GYM_VERIFIERS.items():
        if agent.startswith(beginning):
            return verifier
    raise LeftOutError(f"no verifier for {agent}")


def _read_problem_answer(row: Row) -> Made:
    asked = row.values["problem"] if "problem" in row.values else row.values["question"]
    return _problem(_messages([{"role": "user", "content": asked}]), str(row.values["answer"]), "math")


def _read_gsm8k(row: Row) -> Made:
    _, mark, answer = row.values["answer"].rpartition("#### ")
    if not mark:
        raise ValueError("answer has no last line that begins with ####")
    return _problem(_messages([{"role": "user", "content": row.values["question"]}]), answer.strip(), "math")


def _read_options(row: Row) -> Made:
    return _choice(row.values["question"], row.values["options"], row.values["answer"])


def _read_choices(row: Row) -> Made:
    options = [row.values[f"choice_{letter}"] for letter in "ABCD"]
    return _choice(f"{row.values['context']}\n\n{row.values['question']}", options, row.values["answer"])


def _choice(question: str, options: Iterable[str], answer: str) -> Made:
    listed = [f"{letter}: {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    if answer.strip().upper() not in ascii_uppercase[: len(listed)]:
        raise ValueError(f"answer {answer!r} is none of the {len(listed)} options")
    content = "\n".join([question, "", *listed]) + LETTER
    return _problem(({"role": "user", "content": content},), answer.strip().upper(), "choice")


def _problem(messages: tuple[dict[str, str], ...], answer: str, verifier: str) -> Made:
    return {"prompt": list(_asking_for_a_box(messages)), "answer": answer, "verifier": verifier}


def _messages(messages: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], ...]:
    read = tuple({"role": message["role"], "content": _text(message["content"])} for message in messages)
    if not read:
        raise ValueError("the prompt has no message")
    return read


def _text(content: str | Iterable[Mapping[str, Any]]) -> str:
    """A message's text; NeMo Gym may give it in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _asking_for_a_box(messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    if any("\\boxed" in message["content"] or "Answer:" in message["content"] for message in messages):
        return messages
    last = messages[-1]
    return (*messages[:-1], {"role": last["role"], "content": last["content"] + BOXED})


LAYOUTS: dict[str, Layout] = {
    "conversations": Layout("conversation", _read_ours),
    "messages": Layout("conversation", _read_messages),
    "input_output": Layout("conversation", _read_input_output),
    "problems": Layout("problem", _read_our_problem),
    "dapo_math_17k": Layout("problem", _read_dapo),
    "skywork_or1": Layout("problem", _read_skywork),
    "nemo_gym": Layout("problem", _read_gym),
    "problem_answer": Layout("problem", _read_problem_answer),
    "gsm8k": Layout("problem", _read_gsm8k),
    "options": Layout("problem", _read_options),
    "choices": Layout("problem", _read_choices),
}
"""The layouts there are."""

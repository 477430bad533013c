"""Public sets of verifiable problems, row by row, as ours: the data of paper A's reinforcement learning (section 9).

Each source has a name, the columns it is read by, and what of it we can verify:

``dapo_math_17k``
    Hugging Face ``BytedTsinghua-SIA/DAPO-Math-17k``: ``prompt`` (a list of messages that already asks for a last line
    ``Answer: ...``) and ``reward_model.ground_truth`` (an integer). The set repeats each problem about a hundred times.
``skywork_or1``
    Hugging Face ``Skywork/Skywork-OR1-RL-Data``: ``prompt`` (the bare question), ``ability`` and
    ``reward_model.ground_truth``, a list written as text, any entry of which is right. Code has tests instead of
    answers and is left out.
``nemo_gym``
    Rows of NVIDIA NeMo Gym's data: ``responses_create_params.input`` (a text or messages), ``expected_answer``, and
    ``options`` or the name in ``agent_ref`` that says how to grade. Multiple choice and mathematics are read, the
    latter without the judge that Gym asks where math-verify says no; tools, other judges and sandboxes are left out, as
    are rows whose question stands in another set.

What is left out is counted by its reason. A row without its source's columns is an error: it is another set.
"""

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import ArtifactError, ConfigError

BOXED = "\n\nPut your final answer within \\boxed{}."
"""Added to questions that do not say how to answer."""

_GYM_VERIFIERS = {"mcqa": "choice", "math_with_judge": "math", "library_judge_math": "math"}
"""By the beginning of the agent's name."""


class _LeftOutError(Exception):
    """This row cannot be verified here; the message is the reason."""


@dataclass(frozen=True)
class Converted:
    """The problems of a source, as rows of a problem set (see ``moesaic.data.problems``)."""

    problems: tuple[dict[str, Any], ...]
    left_out: dict[str, int]
    """How many rows, by reason."""


@dataclass(frozen=True)
class _Question:
    messages: tuple[dict[str, str], ...]
    answer: str
    verifier: str


def convert(source: str, rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Read the rows of a source; a problem is kept once, however often it is repeated.

    Raises:
        ConfigError: if there is no such source.
        ArtifactError: if a row does not have the source's columns.
    """
    if source not in SOURCES:
        raise ConfigError(f"there is no prompt source {source!r}; choose one of {', '.join(sorted(SOURCES))}")
    problems: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            question = SOURCES[source](row)
        except _LeftOutError as reason:
            left_out[str(reason)] += 1
            continue
        except (KeyError, IndexError, TypeError, ValueError, SyntaxError) as foreign:
            raise ArtifactError(
                f"row {number} is not of the layout of {source} ({type(foreign).__name__}: {foreign}); it has the "
                f"columns {', '.join(sorted(map(str, row)))}"
            ) from foreign
        problem = _problem(source, question)
        if problem["id"] in problems:
            left_out["repeats an earlier problem"] += 1
        else:
            problems[problem["id"]] = problem
    return Converted(tuple(problems.values()), dict(left_out))


def _problem(source: str, question: _Question) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(question.messages, sort_keys=True).encode()).hexdigest()
    return {
        "id": f"{source}-{digest[:16]}",
        "task": source,
        "prompt": list(question.messages),
        "answer": question.answer,
        "verifier": question.verifier,
    }


def _read_dapo(row: Mapping[str, Any]) -> _Question:
    return _Question(_messages(row["prompt"]), str(row["reward_model"]["ground_truth"]), "math")


def _read_skywork(row: Mapping[str, Any]) -> _Question:
    if row["ability"] != "math":
        raise _LeftOutError(f"{row['ability']} needs a sandbox")
    accepted = ast.literal_eval(row["reward_model"]["ground_truth"])
    if not isinstance(accepted, list) or not accepted:
        raise ValueError(f"reward_model.ground_truth must be a list written as text, found {accepted!r}")
    answers = [str(answer) for answer in accepted]
    answer = answers[0] if len(answers) == 1 else json.dumps(answers)
    return _Question(_asking_for_a_box(_messages(row["prompt"])), answer, "math")


def _read_gym(row: Mapping[str, Any]) -> _Question:
    request = row["responses_create_params"]
    if "_hf_question_placeholder" in row:
        raise _LeftOutError("its question stands in another set")
    if request.get("tools"):
        raise _LeftOutError("needs tools")
    verifier = _gym_verifier(row)
    metadata = row.get("metadata") or {}
    answer = str(row["expected_answer"] if "expected_answer" in row else metadata["expected_answer"]).strip()
    asked = request["input"]
    messages = _messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
    if request.get("instructions"):
        messages = ({"role": "system", "content": str(request["instructions"])}, *messages)
    return _Question(_asking_for_a_box(messages), answer.upper() if verifier == "choice" else answer, verifier)


def _gym_verifier(row: Mapping[str, Any]) -> str:
    agent = (row.get("agent_ref") or {}).get("name")
    if agent is None:
        options = row.get("options") or (row.get("metadata") or {}).get("options")
        return "choice" if options else "math"
    for beginning, verifier in _GYM_VERIFIERS.items():
        if agent.startswith(beginning):
            return verifier
    raise _LeftOutError(f"no verifier for {agent}")


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


SOURCES: dict[str, Callable[[Mapping[str, Any]], _Question]] = {
    "dapo_math_17k": _read_dapo,
    "skywork_or1": _read_skywork,
    "nemo_gym": _read_gym,
}
"""The sources there are."""

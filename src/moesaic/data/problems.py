"""Test problems: what an evaluation asks, and what it expects.

A data set is JSON lines, one problem each: ``{"id", "task", "prompt": [{"role", "content"}], "answer", "verifier"}``.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.chat import render_conversation
from moesaic.data.datasets import Row, check_keys, read_rows
from moesaic.data.messages import read_message
from moesaic.data.verifiers import get_verifier, split_reply

_TEXT_KEYS = ("id", "task", "answer", "verifier")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Problem:
    """One question with its expected answer and the name of the verifier that compares them."""

    id: str
    task: str
    prompt: tuple[Message, ...]
    answer: str
    verifier: str

    def is_solved_by(self, final: str | None) -> bool:
        """Whether a reply's final text is the answer; a reply without one is wrong."""
        return final is not None and get_verifier(self.verifier)(final, self.answer)

    def is_solved_by_reply(self, text: str, truncated: bool) -> bool:
        """Whether a reply (of ``chat.decode_reply``) ends in the answer; a truncated one is wrong."""
        return not truncated and self.is_solved_by(split_reply(text).final)


Question = tuple[Problem, str]
"""A problem and the effort at which it is asked."""


def read_problems(path: Path) -> list[Problem]:
    """Read a data set: a ``.jsonl`` file, or a directory that holds exactly one.

    Raises:
        ArtifactError: if it is missing, empty or a line is not a problem; the message names the line.
    """
    problems = [read_problem(row) for row in read_rows(path)]
    repeated = [name for name, count in Counter(problem.id for problem in problems).items() if count > 1]
    if repeated:
        raise ArtifactError(f"{path}: the id {repeated[0]!r} appears more than once; ids must be unique")
    return problems


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256 of the problems: whoever was asked these and no others has the same."""
    return hashlib.sha256(json.dumps([asdict(problem) for problem in problems]).encode()).hexdigest()


def first_of_each_task(problems: Iterable[Problem], limit: int) -> list[Problem]:
    """The first ``limit`` problems of every task, in the order of the set."""
    seen: Counter[str] = Counter()
    chosen = []
    for problem in problems:
        seen[problem.task] += 1
        if seen[problem.task] <= limit:
            chosen.append(problem)
    return chosen


def spread_over_tasks(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """``limit`` problems, as evenly over the tasks as there are, the first of each; in the order of the set."""
    rank_of_task: Counter[str] = Counter()
    ranks = []
    for place, problem in enumerate(problems):
        ranks.append((rank_of_task[problem.task], place))
        rank_of_task[problem.task] += 1
    chosen = sorted(ranks)[:limit]
    return [problems[place] for place in sorted(place for _, place in chosen)]


def render_prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, effort: str) -> list[int]:
    """Token ids of the prompt in the tokenizer's chat template, up to where the model's reply begins."""
    messages = [{"role": message.role, "content": message.content} for message in problem.prompt]
    try:
        return render_conversation(messages, tokenizer, effort)
    except ArtifactError as refused:
        raise type(refused)(f"problem {problem.id!r}: {refused}") from refused


def read_problem(row: Row) -> Problem:
    """One row of a problem set; an ArtifactError says why it is none."""
    entry = row.values
    for key in _TEXT_KEYS:
        if not isinstance(entry.get(key), str):
            raise ArtifactError(f"{row.place}: {key!r} must be text, found {entry.get(key)!r}")
    check_keys(entry, (*_TEXT_KEYS, "prompt"), row.place)
    prompt = entry.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise ArtifactError(f"{row.place}: 'prompt' must be a list of {{'role', 'content'}} objects, found {prompt!r}")
    asked = [read_message(message, f"{row.place}: 'prompt'") for message in prompt]
    for message in asked:
        check_keys(message, ("role", "content"), f"{row.place}: a message to be answered")
    if asked[-1]["role"] == "assistant":
        raise ArtifactError(f"{row.place}: 'prompt' ends with what the assistant said; it must end with what is asked")
    try:
        get_verifier(entry["verifier"])
    except ConfigError as unknown:
        raise ArtifactError(f"{row.place}: {unknown}") from unknown
    messages = tuple(Message(message["role"], message["content"]) for message in asked)
    return Problem(entry["id"], entry["task"], messages, entry["answer"], entry["verifier"])

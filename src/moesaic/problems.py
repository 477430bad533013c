"""Test problems: what an evaluation asks, and what it expects.

A data set is JSON lines, one problem each: ``{"id", "task", "prompt": [{"role", "content"}], "answer", "verifier"}``.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moesaic.errors import ArtifactError, ConfigError
from moesaic.verifiers import get_verifier

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


def read_problems(path: Path) -> list[Problem]:
    """Read a data set: a ``.jsonl`` file, or a directory that holds exactly one.

    Raises:
        ArtifactError: if it is missing, empty or a line is not a problem; the message names the line.
    """
    file = _data_file(path)
    problems = list(_parse_lines(file))
    if not problems:
        raise ArtifactError(f"{file} holds no problems; write at least one JSON object, on a line of its own")
    repeated = [name for name, count in Counter(problem.id for problem in problems).items() if count > 1]
    if repeated:
        raise ArtifactError(f"{file}: the id {repeated[0]!r} appears more than once; ids must be unique")
    return problems


def first_of_each_task(problems: Iterable[Problem], limit: int) -> list[Problem]:
    """The first ``limit`` problems of every task, in the order of the set."""
    seen: Counter[str] = Counter()
    chosen = []
    for problem in problems:
        seen[problem.task] += 1
        if seen[problem.task] <= limit:
            chosen.append(problem)
    return chosen


def render_prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, effort: str) -> list[int]:
    """Token ids of the prompt in the tokenizer's chat template, up to where the model's reply begins."""
    if tokenizer.chat_template is None:
        raise ArtifactError("the model's tokenizer has no chat template; add chat_template.jinja to the checkpoint")
    messages = [{"role": message.role, "content": message.content} for message in problem.prompt]
    ids = tokenizer.apply_chat_template(
        messages, reasoning_effort=effort, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in ids]


def _data_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise ArtifactError(f"{path} must hold exactly one .jsonl file, found {len(files)}")
        return files[0]
    if not path.is_file():
        raise ArtifactError(f"there is no data set at {path}; give a .jsonl file or a directory that holds one")
    return path


def _parse_lines(file: Path) -> Iterator[Problem]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _parse_problem(json.loads(line))
                except (ValueError, ConfigError) as wrong:
                    raise ArtifactError(f"{file}, line {number}: {wrong}") from wrong


def _parse_problem(entry: Any) -> Problem:
    if not isinstance(entry, dict):
        raise ValueError(f"a problem is a JSON object, found {type(entry).__name__}")
    for key in _TEXT_KEYS:
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{key!r} must be text, found {entry.get(key)!r}")
    prompt = entry.get("prompt")
    if not isinstance(prompt, list) or not prompt or not all(_is_message(message) for message in prompt):
        raise ValueError(f"'prompt' must be a list of {{'role', 'content'}} objects, found {prompt!r}")
    get_verifier(entry["verifier"])
    messages = tuple(Message(message["role"], message["content"]) for message in prompt)
    return Problem(entry["id"], entry["task"], messages, entry["answer"], entry["verifier"])


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))

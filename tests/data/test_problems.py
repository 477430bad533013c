"""Reading test problems, and what a model is shown of them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moesaic.core.errors import ArtifactError
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Message, Problem, first_of_each_task, read_problems, render_prompt

ENTRY = {
    "id": "a-0",
    "task": "add",
    "prompt": [{"role": "user", "content": "w1 w2"}],
    "answer": "w3",
    "verifier": "exact_match",
}


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_reads_a_file_and_a_directory_with_one_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "tests.jsonl", ENTRY, "", ENTRY | {"id": "a-1"})
    problems = read_problems(file)
    assert [problem.id for problem in problems] == ["a-0", "a-1"]
    assert problems[0].prompt[0].content == "w1 w2"
    assert read_problems(tmp_path) == problems


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON: Expecting"),
        ("[1]", "line 2 must be a JSON object, found list"),
        (ENTRY | {"id": 7}, "line 2: 'id' must be text, found 7"),
        (ENTRY | {"prompt": []}, "line 2: 'prompt' must be a list"),
        (
            ENTRY | {"prompt": [*ENTRY["prompt"], {"role": "assistant", "content": "w4"}]},
            "'prompt' ends with what the assistant said",
        ),
        (
            ENTRY | {"prompt": [{"role": "user"}]},
            "line 2: 'prompt': each message needs a text for role and for content",
        ),
        (ENTRY | {"prompt": [ENTRY["prompt"][0] | {"thinking": "w4"}]}, "nothing reads the key 'thinking'"),
        (ENTRY | {"solution": "w3"}, "line 2: nothing reads the key 'solution'; allowed are answer, id, prompt, task"),
        (ENTRY | {"verifier": "vibes"}, "line 2: there is no verifier 'vibes'; choose one of exact_match"),
        (ENTRY, "the id 'a-0' appears more than once"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_problems(write_lines(tmp_path / "tests.jsonl", ENTRY, line))


def test_missing_ambiguous_and_empty_sets(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file or directory"):
        read_problems(tmp_path / "absent.jsonl")
    with pytest.raises(ArtifactError, match="exactly one; found none"):
        read_problems(tmp_path)
    write_lines(tmp_path / "a.jsonl")
    with pytest.raises(ArtifactError, match="is empty"):
        read_problems(tmp_path)
    write_lines(tmp_path / "b.jsonl")
    with pytest.raises(ArtifactError, match=r"exactly one; found a\.jsonl, b\.jsonl"):
        read_problems(tmp_path)


def problem(identity: str, task: str = "add") -> Problem:
    return Problem(identity, task, (), "w3", "exact_match")


def test_the_first_of_each_task_in_the_order_of_the_set() -> None:
    problems = [problem("a"), problem("b"), problem("c", "sort"), problem("d"), problem("e", "sort")]
    assert [chosen.id for chosen in first_of_each_task(problems, 2)] == ["a", "b", "c", "e"]


def test_only_the_right_final_text_solves() -> None:
    assert problem("a").is_solved_by(" w3 ")
    assert not problem("a").is_solved_by("w4")
    assert not problem("a").is_solved_by(None)


def test_a_prompt_is_the_chat_template_up_to_the_reply(tiny_parent: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    asked = read_problems(write_lines(tmp_path / "tests.jsonl", ENTRY))[0]
    text = tokenizer.decode(render_prompt(asked, tokenizer, "high"))
    system = "<|start|> system <|message|> Reasoning: high <|end|>"
    assert text.split() == f"{system} <|start|> user <|message|> w1 w2 <|end|> <|start|> assistant".split()


def test_prompts_are_the_same_on_every_day(tiny_parent: Path) -> None:
    """gpt-oss's template prints today's date."""
    tokenizer = load_tokenizer(tiny_parent)
    tokenizer.chat_template = "{{ strftime_now('%Y') }} " + tokenizer.chat_template
    tokenizer.add_tokens(["2025"])
    problem = Problem("a", "t", (Message("user", "1 + 1"),), "2", "exact_match")
    assert tokenizer.decode(render_prompt(problem, tokenizer, "low")).startswith("2025")

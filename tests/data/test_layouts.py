"""Rows of other sets' layouts, written by hand, become conversations and problems, or are left out for a reason."""

import json
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.data.calibration import read_conversation
from moesaic.data.datasets import Row
from moesaic.data.prepare.layouts import BOXED, LETTER, LeftOutError, Made, read_row
from moesaic.data.problems import read_problem

DAPO: dict[str, Any] = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 2 + 2?\n\nGive it after 'Answer:'."}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
SKYWORK: dict[str, Any] = {
    "data_source": "train-math-numinamath1.5_olympiads",
    "prompt": [{"role": "user", "content": "What is half of one?"}],
    "ability": "math",
    "reward_model": {"ground_truth": '["\\\\frac{1}{2}", "50\\\\%"]', "style": "rule"},
    "extra_info": {"index": 7, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
}
GYM_CHOICE: dict[str, Any] = {
    "responses_create_params": {"input": [{"role": "user", "content": "Answer in \\boxed{}. Which?\nA: one\nB: two"}]},
    "options": [{"A": "one"}, {"B": "two"}],
    "expected_answer": "b",
    "grading_mode": "strict_single_letter_boxed",
    "uuid": "3c26f339",
    "agent_ref": {"type": "responses_api_agents", "name": "mcqa_simple_agent"},
}
GYM_MATH: dict[str, Any] = {
    "responses_create_params": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "What is 15 * 7?"}]}],
        "instructions": "Be brief.",
    },
    "question": "What is 15 * 7?",
    "expected_answer": 105,
    "agent_ref": {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"},
}


def _read(layout: str, row: dict[str, Any], task: str = "set") -> Made:
    return read_row(layout, Row(row, "rows.jsonl, line 1"), task)


@pytest.mark.parametrize(
    ("layout", "row", "prompt", "answer", "verifier", "solved"),
    [
        ("dapo_math_17k", DAPO, DAPO["prompt"], "4", "math", "So\nAnswer: 4"),
        (
            "skywork_or1",
            SKYWORK,
            [{"role": "user", "content": "What is half of one?" + BOXED}],
            json.dumps(["\\frac{1}{2}", "50\\%"]),
            "math",
            "\\boxed{0.5}",
        ),
        ("nemo_gym", GYM_CHOICE, GYM_CHOICE["responses_create_params"]["input"], "B", "choice", "\\boxed{B}"),
        (
            "nemo_gym",
            GYM_MATH,
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 15 * 7?" + BOXED}],
            "105",
            "math",
            "It is \\boxed{105}.",
        ),
        (
            "problem_answer",
            {"problem": "What is $1+1$?", "answer": "2", "subject": "Algebra"},
            [{"role": "user", "content": "What is $1+1$?" + BOXED}],
            "2",
            "math",
            "\\boxed{2}",
        ),
        (
            "gsm8k",
            {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
            [{"role": "user", "content": "Two and two?" + BOXED}],
            "4",
            "math",
            "\\boxed{4}",
        ),
        (
            "options",
            {"question": "Which?", "options": ["one", "two"], "answer": "B", "answer_index": 1, "category": "law"},
            [{"role": "user", "content": "Which?\n\nA: one\nB: two" + LETTER}],
            "B",
            "choice",
            "\\boxed{B}",
        ),
        (
            "choices",
            {
                "context": "Long.",
                "question": "Which?",
                **{f"choice_{letter}": letter for letter in "ABCD"},
                "answer": "C",
            },
            [{"role": "user", "content": "Long.\n\nWhich?\n\nA: A\nB: B\nC: C\nD: D" + LETTER}],
            "C",
            "choice",
            "\\boxed{C}",
        ),
    ],
)
def test_a_row_becomes_a_problem_that_a_right_reply_solves(
    layout: str, row: dict[str, Any], prompt: object, answer: str, verifier: str, solved: str
) -> None:
    made = _read(layout, row)
    assert (made["prompt"], made["answer"], made["verifier"]) == (prompt, answer, verifier)
    read = read_problem(Row(made, "itself"))
    assert read.task == "set" and read.id.startswith("set-")
    assert read.is_solved_by(solved)
    assert not read.is_solved_by("\\boxed{A}")


USER = {"role": "user", "content": "Why?", "tool_calls": []}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}


@pytest.mark.parametrize(
    ("layout", "row", "messages"),
    [
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": ""},
                    USER,
                    THOUGHT,
                ]
            },
            [{"role": "user", "content": "Why?"}, {"role": "assistant", "thinking": "Hm.", "content": "So."}],
        ),
        *(
            (
                "messages",
                {"messages": [USER, {"role": "assistant", name: "Hm.", "content": "So.", "tool_calls": None}]},
                [{"role": "user", "content": "Why?"}, {"role": "assistant", "thinking": "Hm.", "content": "So."}],
            )
            for name in ("thinking", "reasoning_content", "reasoning")
        ),
        (
            "messages",
            {"messages": [USER, THOUGHT | {"reasoning_content": "Hm.", "reasoning": ""}]},
            [{"role": "user", "content": "Why?"}, {"role": "assistant", "thinking": "Hm.", "content": "So."}],
        ),
        (
            "input_output",
            {"input": [USER], "output": "So.", "system_prompt": "detailed thinking off", "category": "chat"},
            [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
        ),
        (
            "input_output",
            {"input": "Why?", "output": "So.", "system_prompt": "Be brief."},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ],
        ),
    ],
)
def test_a_row_becomes_a_conversation(layout: str, row: dict[str, Any], messages: object) -> None:
    made = _read(layout, row)
    assert made["messages"] == messages and made["task"] == row.get("category", "set")
    assert len(read_conversation(Row(made, "itself")).messages) == len(made["messages"])


def test_ids_depend_on_the_prompt_alone() -> None:
    assert _read("dapo_math_17k", DAPO | {"extra_info": {"index": "b"}}) == _read("dapo_math_17k", DAPO)
    other = DAPO | {"prompt": [{"role": "user", "content": "What is 1 + 3? Answer:"}]}
    assert _read("dapo_math_17k", other)["id"] != _read("dapo_math_17k", DAPO)["id"]


def test_a_single_accepted_answer_is_kept_plain() -> None:
    assert _read("skywork_or1", SKYWORK | {"reward_model": {"ground_truth": "['7']"}})["answer"] == "7"


REQUEST = GYM_MATH["responses_create_params"]


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        (
            "nemo_gym",
            GYM_MATH | {"responses_create_params": REQUEST | {"tools": [{"type": "function"}]}},
            "needs tools",
        ),
        (
            "nemo_gym",
            GYM_MATH | {"agent_ref": {"name": "code_gen_simple_agent"}},
            "no verifier for code_gen_simple_agent",
        ),
        ("nemo_gym", GYM_MATH | {"_hf_question_placeholder": {"row": 246}}, "its question stands in another set"),
        ("skywork_or1", SKYWORK | {"ability": "code"}, "code needs a sandbox"),
        ("messages", {"messages": [USER, THOUGHT | {"reasoning": "Oh."}]}, "reasoning in two places that differ"),
        (
            "messages",
            {"messages": [USER | {"reasoning": "Oh."}, THOUGHT]},
            "messages with reasoning, which nothing reads",
        ),
        (
            "messages",
            {"messages": [USER, THOUGHT | {"audio": {"id": "a"}}]},
            "has messages with audio, which nothing reads",
        ),
        ("messages", {"messages": [USER]}, "does not end with a reply"),
        ("messages", {"messages": [USER, {"role": "tool", "content": "x"}]}, "has messages of the role tool"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": "<think>Hm"}]},
            "empty or unfinished message",
        ),
    ],
)
def test_what_cannot_be_used_is_left_out_for_a_reason(layout: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(LeftOutError, match=reason):
        _read(layout, row)


def test_gym_rows_without_an_agent_go_by_their_options() -> None:
    choice = {key: value for key, value in GYM_CHOICE.items() if key != "agent_ref"}
    older = {key: value for key, value in choice.items() if key not in ("options", "expected_answer")}
    older["metadata"] = {"options": choice["options"], "expected_answer": "B"}
    plain = {"responses_create_params": {"input": "What is 2 + 2?"}, "expected_answer": "4"}
    assert [_read("nemo_gym", row)["verifier"] for row in (choice, older, plain)] == ["choice", "choice", "math"]


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("dapo_math_17k", GYM_MATH, r"line 1 is not of the layout 'dapo_math_17k' \(KeyError: 'prompt'\).*agent_ref"),
        ("skywork_or1", SKYWORK | {"reward_model": {"ground_truth": "3"}}, "must be a list written as text"),
        ("skywork_or1", SKYWORK | {"reward_model": {"ground_truth": "[1"}}, "SyntaxError"),
        ("nemo_gym", DAPO, "responses_create_params"),
        ("dapo_math_17k", DAPO | {"prompt": []}, "the prompt has no message"),
        ("options", {"question": "?", "options": ["one"], "answer": "B"}, "none of the 1 options"),
        ("gsm8k", {"question": "?", "answer": "4"}, "no last line"),
        ("conversations", {"messages": []}, "has no conversation"),
        ("problems", {"id": "1"}, "'task' must be text"),
        ("messages", {"messages": "text"}, "is not of the layout 'messages'"),
    ],
)
def test_a_row_of_another_layout_is_refused(layout: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        _read(layout, row)

"""Rows of the public sets' layouts, written by hand, become problems; what cannot be verified is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.problems import read_problems
from moesaic.data.prompt_sources import BOXED, convert

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


@pytest.mark.parametrize(
    ("source", "row", "prompt", "answer", "verifier", "solved"),
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
    ],
)
def test_a_row_becomes_a_problem_that_a_right_reply_solves(
    source: str, row: dict[str, Any], prompt: object, answer: str, verifier: str, solved: str, tmp_path: Path
) -> None:
    (problem,) = convert(source, [row]).problems
    assert (problem["prompt"], problem["answer"], problem["verifier"]) == (prompt, answer, verifier)
    (tmp_path / "prompts.jsonl").write_text(json.dumps(problem) + "\n")
    (read,) = read_problems(tmp_path)
    assert read.task == source
    assert read.is_solved_by(solved)
    assert not read.is_solved_by("\\boxed{A}")


def test_repeated_problems_are_kept_once_and_ids_depend_on_the_prompt_alone() -> None:
    other = DAPO | {"prompt": [{"role": "user", "content": "What is 1 + 3? Answer:"}]}
    converted = convert("dapo_math_17k", [DAPO, other, DAPO | {"extra_info": {"index": "b"}}])
    assert [problem["prompt"][0]["content"][:13] for problem in converted.problems] == [
        "What is 2 + 2",
        "What is 1 + 3",
    ]
    assert converted.left_out == {"repeats an earlier problem": 1}
    assert convert("dapo_math_17k", [other]).problems == converted.problems[1:]


def test_a_single_accepted_answer_is_kept_plain() -> None:
    row = SKYWORK | {"reward_model": {"ground_truth": "['7']"}}
    assert convert("skywork_or1", [row]).problems[0]["answer"] == "7"


def test_what_we_cannot_verify_is_counted_by_reason() -> None:
    request = GYM_MATH["responses_create_params"]
    rows = [
        GYM_MATH | {"responses_create_params": request | {"tools": [{"type": "function"}]}},
        GYM_MATH | {"agent_ref": {"name": "code_gen_simple_agent"}},
        GYM_MATH | {"_hf_question_placeholder": {"dataset": "Skywork/Skywork-OR1-RL-Data", "row": 246}},
    ]
    assert convert("nemo_gym", rows).left_out == {
        "needs tools": 1,
        "no verifier for code_gen_simple_agent": 1,
        "its question stands in another set": 1,
    }
    assert convert("skywork_or1", [SKYWORK | {"ability": "code"}]).left_out == {"code needs a sandbox": 1}


def test_gym_rows_without_an_agent_go_by_their_options() -> None:
    choice = {key: value for key, value in GYM_CHOICE.items() if key != "agent_ref"}
    older = {key: value for key, value in choice.items() if key not in ("options", "expected_answer")}
    older["metadata"] = {"options": choice["options"], "expected_answer": "B"}
    plain = {"responses_create_params": {"input": "What is 2 + 2?"}, "expected_answer": "4"}
    verifiers = [convert("nemo_gym", [row]).problems[0]["verifier"] for row in (choice, older, plain)]
    assert verifiers == ["choice", "choice", "math"]


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        ("dapo_math_17k", GYM_MATH, r"row 1 is not of the layout of dapo_math_17k \(KeyError: 'prompt'\).*agent_ref"),
        ("skywork_or1", SKYWORK | {"reward_model": {"ground_truth": "3"}}, "must be a list written as text"),
        ("skywork_or1", SKYWORK | {"reward_model": {"ground_truth": "[1"}}, "SyntaxError"),
        ("nemo_gym", DAPO, "responses_create_params"),
        ("dapo_math_17k", DAPO | {"prompt": []}, "the prompt has no message"),
    ],
)
def test_a_row_of_another_layout_is_refused(source: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        convert(source, [row])


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'dapo'.*dapo_math_17k, nemo_gym, skywork_or1"):
        convert("dapo", [])

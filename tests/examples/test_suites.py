"""The suite's file against the launcher's own words: its keys, its task names, and the paper's repeats."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

SUITE = Path("examples/suites/paper.yaml")
VARIABLES = {
    "SUITE_OUTPUT": "results",
    "SUITE_MODEL": "child",
    "SUITE_URL": "http://127.0.0.1:8000/v1/chat/completions",
    "SUITE_EFFORT": "low",
    "SUITE_TOKENIZER": "openai/gpt-oss-120b",
    "JUDGE_MODEL": "judge",
    "JUDGE_URL": "http://127.0.0.1:9000/v1",
}
REPEATS = {"mmlu_pro": 1, "gpqa": 16, "hle": 1, "aa_lcr": 16, "aime2025": 64, "ifbench": 5, "scicode": 8}
PARAMETERS = {"parallelism", "max_new_tokens", "temperature", "top_p", "extra"}
"""What the commands of both harnesses read of ``config.params``."""
EXTRA = {
    "nemo_skills": {"num_repeats", "judge_support", "judge"},
    "ruler": {"tokenizer_backend", "tokenizer"},
}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    content = OmegaConf.to_container(OmegaConf.load(SUITE), resolve=True)
    assert isinstance(content, dict)
    return content


def test_keys_are_those_the_launcher_knows(suite: dict[str, Any]) -> None:
    assert set(suite) == {"defaults", "execution", "target", "evaluation"}
    assert suite["defaults"] == [{"execution": "local"}, {"deployment": "none"}, "_self_"]
    assert set(suite["target"]["api_endpoint"]) == {"model_id", "url", "api_key_name"}
    assert set(suite["evaluation"]) == {"env_vars", "nemo_evaluator_config", "tasks"}
    assert all(value == f"host:{name}" for name, value in suite["evaluation"]["env_vars"].items())
    for task in suite["evaluation"]["tasks"]:
        assert set(task) == {"name", "nemo_evaluator_config"}
        params = task["nemo_evaluator_config"]["config"]["params"]
        assert set(params) <= PARAMETERS and set(params["extra"]) <= EXTRA[task["name"].partition(".")[0]]


def test_the_effort_reaches_every_request_in_both_forms(suite: dict[str, Any]) -> None:
    shared = suite["evaluation"]["nemo_evaluator_config"]
    assert set(shared["config"]["params"]) <= PARAMETERS
    added = shared["target"]["api_endpoint"]["adapter_config"]["params_to_add"]
    assert added == {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}}


def test_the_benchmarks_are_the_papers_with_their_repeats(suite: dict[str, Any]) -> None:
    tasks = {task["name"]: task["nemo_evaluator_config"]["config"]["params"] for task in suite["evaluation"]["tasks"]}
    found = {name.removeprefix("nemo_skills.ns_"): params["extra"].get("num_repeats") for name, params in tasks.items()}
    assert found == REPEATS | {"ruler.ruler-128k-chat": None}
    judged = {name for name, params in tasks.items() if "judge" in params["extra"]}
    assert judged == {"nemo_skills.ns_hle", "nemo_skills.ns_aa_lcr"}

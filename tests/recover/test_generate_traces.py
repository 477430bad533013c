"""Traces of a random model: every number recomputed from the rows, and a killed run that ends as if it had not been."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Problem, read_problems, render_prompt, spread_over_tasks
from moesaic.models.generation import Generated
from moesaic.recover.generate_traces import run as generate_traces
from moesaic.recover.generate_traces.run import choose_held_out
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.generate_traces.traces import read_traces

CONFIG = GenerateTracesConfig(
    efforts=("low", "high"),
    samples_per_prompt=2,
    max_new_tokens=6,
    keep_truncated=True,
    held_out_share=0.3,
    batch_size=5,
    temperature=1.0,
)
"""6 prompts with 2 replies each at 2 efforts: 24 replies, 3 chunks per effort."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [
        {
            "id": f"{task}-{index}",
            "task": task,
            "prompt": [{"role": "user", "content": f"w{index} w{index + 1} w2"[: 6 + index]}],
            "answer": "w1",
            "verifier": "exact_match",
        }
        for task in ("add", "hops")
        for index in range(3)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(
    config: GenerateTracesConfig, model: Path, prompts: Path, tmp_path: Path, name: str = "one"
) -> tuple[dict[str, float], Path]:
    output, scratch = tmp_path / name / "output", tmp_path / name / "scratch"
    output.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    return generate_traces.run(config, model=model, prompts=prompts, output=output, scratch=scratch), output


def test_rows_and_figures(tiny_parent: Path, prompts: Path, tmp_path: Path) -> None:
    metrics, output = run(CONFIG, tiny_parent, prompts, tmp_path)
    traces = read_traces(output)
    problems, tokenizer = read_problems(prompts), load_tokenizer(tiny_parent)
    assert [(trace.effort, trace.id) for trace in traces] == [
        (effort, problem.id) for effort in CONFIG.efforts for problem in problems for _ in range(2)
    ]
    for trace in traces:
        problem = next(problem for problem in problems if problem.id == trace.id)
        assert list(trace.prompt_ids) == render_prompt(problem, tokenizer, trace.effort)
        assert trace.truncated == (trace.reply_ids[-1] != 5)  # 5 is <|return|>, where replies end
        assert trace.truncated <= (len(trace.reply_ids) == 6)
    assert sum(trace.held_out for trace in traces) == 2 * 2 * 2  # a third of 6 prompts, both efforts, both samples
    summary = json.loads((output / "summary.json").read_text())["efforts"]
    for effort in CONFIG.efforts:
        found = [trace for trace in traces if trace.effort == effort]
        assert summary[effort]["tokens_per_request"] == pytest.approx(fmean(len(one.reply_ids) for one in found))
        assert summary[effort]["truncated"] == pytest.approx(fmean(one.truncated for one in found))
        tasks = summary[effort]["tasks"]
        assert set(tasks) == {trace.task for trace in found}
        for task, figures in tasks.items():
            lengths = [len(one.reply_ids) for one in found if one.task == task]
            assert figures["tokens_per_request"] == pytest.approx(fmean(lengths))
        assert summary[effort]["traces"] == metrics[f"traces_{effort}"] == 12
    assert metrics["tokens"] == sum(len(trace.token_ids) for trace in traces)
    assert (metrics["traces"], metrics["traces_held_out"]) == (24, 8)


def test_a_killed_run_repeats_one_chunk_and_ends_with_the_same_bytes(
    tiny_parent: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run(CONFIG, tiny_parent, prompts, tmp_path, "whole")
    real, calls = generate_traces.generate, []

    def dies_in_its_fourth_call(*arguments: Any) -> list[Generated]:
        calls.append(len(arguments[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generate_traces, "generate", dies_in_its_fourth_call)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tiny_parent, prompts, tmp_path, "killed")
    assert not list((tmp_path / "killed/output").iterdir())
    _, resumed = run(CONFIG, tiny_parent, prompts, tmp_path, "killed")
    assert calls == [5, 5, 2, 5, 5, 5, 2]
    for name in ("traces.jsonl", "summary.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_sampling_depends_on_seed_effort_and_chunk(tiny_parent: Path, prompts: Path, tmp_path: Path) -> None:
    def replies(config: GenerateTracesConfig, name: str) -> dict[str, list[tuple[int, ...]]]:
        _, output = run(config, tiny_parent, prompts, tmp_path, name)
        traces = read_traces(output)
        return {effort: [one.reply_ids for one in traces if one.effort == effort] for effort in config.efforts}

    both = replies(CONFIG, "both")
    assert replies(CONFIG.model_copy(update={"efforts": ("high",)}), "high")["high"] == both["high"]
    assert replies(CONFIG.model_copy(update={"seed": 1}), "other")["high"] != both["high"]
    assert both["high"][0] != both["high"][1]  # two samples of one prompt


def test_truncated_replies_count_but_are_not_handed_on(tiny_parent: Path, prompts: Path, tmp_path: Path) -> None:
    _, all_of_them = run(CONFIG, tiny_parent, prompts, tmp_path, "all")
    longer = {"max_new_tokens": 60, "keep_truncated": False}
    metrics, output = run(CONFIG.model_copy(update=longer), tiny_parent, prompts, tmp_path, "whole")
    traces = read_traces(output)
    assert traces and not any(trace.truncated for trace in traces)
    assert 0 < metrics["truncated_low"] < 1
    assert metrics["traces_low"] == round(12 * (1 - metrics["truncated_low"]))
    longest = max(len(trace.reply_ids) for trace in traces if trace.effort == "low")
    assert longest <= 60 and metrics["tokens_per_request_low"] > fmean(
        len(trace.reply_ids) for trace in traces if trace.effort == "low"
    )
    assert len(read_traces(all_of_them)) == 24


def test_nothing_to_learn_from_is_an_error(tiny_parent: Path, prompts: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"keep_truncated": False, "max_new_tokens": 1})
    with pytest.raises(ConfigError, match="all such replies are truncated; raise max_new_tokens"):
        run(config, tiny_parent, prompts, tmp_path)
    assert not list((tmp_path / "one/output").iterdir())


def problem(name: str, task: str) -> Problem:
    return Problem(name, task, (), "", "exact_match")


def test_prompts_are_spread_over_tasks() -> None:
    problems = [problem(name, name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "c2", "c3")]

    def chosen(limit: int | None) -> list[str]:
        return [one.id for one in spread_over_tasks(problems, limit)]

    assert chosen(3) == ["a1", "b1", "c1"]
    assert chosen(4) == ["a1", "a2", "b1", "c1"]
    assert chosen(6) == ["a1", "a2", "a3", "b1", "c1", "c2"]
    assert chosen(None) == chosen(100) == [one.id for one in problems]


def test_held_out_prompts_follow_from_id_and_seed() -> None:
    ids = [f"add-{index}" for index in range(40)]
    held_out = choose_held_out(ids, 0.25, seed=0)
    assert len(held_out) == 10
    assert choose_held_out(ids[::-1], 0.25, seed=0) == held_out
    assert choose_held_out(ids, 0.25, seed=1) != held_out
    assert choose_held_out(ids[:5], 0.01, 0) == choose_held_out(ids[:5], 0.2, 0)  # at least one
    assert len(choose_held_out(ids[:2], 0.9, 0)) == 1  # and not all
    with pytest.raises(ArtifactError, match="1 prompt is too few"):
        choose_held_out(ids[:1], 0.5, 0)


def test_bad_inputs_are_refused_before_the_model_is_loaded(
    tiny_parent: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(generate_traces, "load_model")
    with pytest.raises(ArtifactError, match="no such file or directory"):
        run(CONFIG, tiny_parent, tmp_path / "absent.jsonl", tmp_path)
    with pytest.raises(ConfigError, match=r"the prompt '.* does not fit the model's 512 positions"):
        run(CONFIG.model_copy(update={"max_new_tokens": 600}), tiny_parent, prompts, tmp_path)


def test_several_samples_need_a_temperature() -> None:
    with pytest.raises(ConfigError, match="samples_per_prompt above 1 needs a temperature"):
        GenerateTracesConfig.parse('{"samples_per_prompt": 2}')

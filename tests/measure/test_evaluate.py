"""Evaluation of a random model on a few problems: every number recomputed from the samples."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoTokenizer

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.problems import first_of_each_task, problems_digest, read_problems
from moesaic.measure.evaluate import run as evaluate
from moesaic.measure.evaluate.run import Sample, judge, summarize
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.models import kv_cache
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.generation import Generated

CONFIG = EvaluateConfig(efforts=("low", "high"), problems_per_task=2, max_new_tokens=6, batch_size=3)


@pytest.fixture
def tests(tmp_path: Path) -> Path:
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
    path = tmp_path / "tests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(config: EvaluateConfig, model: Path, tests: Path, tmp_path: Path) -> tuple[dict[str, float], Path]:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    return evaluate.run(config, model=model, tests=tests, output=output, scratch=scratch), output


def test_every_number_follows_from_the_samples(tiny_parent: Path, tests: Path, tmp_path: Path) -> None:
    metrics, output = run(CONFIG, tiny_parent, tests, tmp_path)
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(s["effort"], s["id"]) for s in samples] == [
        (effort, f"{task}-{index}") for effort in ("low", "high") for task in ("add", "hops") for index in (0, 1)
    ]
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation["name"] == "parent"
    assert (evaluation["kv_cache"], evaluation["steps"]) == (None, [])
    assert evaluation["efforts"]["low"]["tasks"]["hops"]["solved"] == {
        sample["id"]: sample["correct"] for sample in samples if (sample["effort"], sample["task"]) == ("low", "hops")
    }
    asked = first_of_each_task(read_problems(tests), 2)
    assert evaluation["problems"] == {"split": "test", "count": 4, "digest": problems_digest(asked)}
    assert problems_digest(asked[::-1]) != problems_digest(asked)
    low = [sample for sample in samples if sample["effort"] == "low"]
    assert metrics["tokens_per_request_low"] == pytest.approx(fmean(sample["tokens"] for sample in low))
    assert metrics["truncated_low"] == pytest.approx(fmean(sample["truncated"] for sample in low))
    assert all(sample["tokens"] == 6 for sample in samples if sample["truncated"])
    assert not any(sample["correct"] for sample in samples if sample["truncated"])


def test_a_finished_effort_is_not_repeated(tiny_parent: Path, tests: Path, tmp_path: Path) -> None:
    run(CONFIG, tiny_parent, tests, tmp_path)
    first = (tmp_path / "output/samples.jsonl").read_text()
    kept = tmp_path / "scratch/samples-low.jsonl"
    kept.write_text(kept.read_text().replace('"correct": false', '"correct": true'))
    (tmp_path / "scratch/samples-high.jsonl").unlink()
    metrics, output = run(CONFIG, tiny_parent, tests, tmp_path)
    assert metrics["accuracy_low"] == 1
    assert (output / "samples.jsonl").read_text().splitlines()[4:] == first.splitlines()[4:]


def test_the_suite_is_the_mean_over_tasks_not_over_problems() -> None:
    def sample(task: str, correct: bool, tokens: int) -> Sample:
        return Sample("x", task, "low", "", correct, tokens, False)

    found = summarize([sample("add", True, 10), sample("hops", True, 20), sample("hops", False, 40)])
    assert found["accuracy"] == 0.75
    assert found["tokens_per_request"] == 20
    assert found["tasks"]["hops"]["accuracy"] == 0.5


def test_a_right_and_complete_answer_is_correct(tiny_parent: Path, tests: Path, tmp_path: Path) -> None:
    """Judged on text, so that the test does not wait for a random model to be right."""
    tokenizer, problem = AutoTokenizer.from_pretrained(tiny_parent), read_problems(tests)[0]
    words = "<|channel|> final <|message|> w1 <|return|>"
    ids = tuple(tokenizer(words, add_special_tokens=False)["input_ids"])
    assert judge(problem, Generated(ids, False), tokenizer, "low").correct
    assert not judge(problem, Generated(ids, True), tokenizer, "low").correct
    assert not judge(problem, Generated(ids[:-1], False), tokenizer, "low").correct


def test_an_emulated_cache_changes_what_is_generated(tiny_parent: Path, tests: Path, tmp_path: Path) -> None:
    """Scales of 1000 round most keys and values to zero; scales of 1 keep most of them."""
    source = Checkpoint.open(tiny_parent)
    coarse = kv_cache.scale_tensors([kv_cache.KvScales(1000.0, 1000.0)] * 4)
    rewrite_checkpoint(source, tmp_path / "model", {}, {"stage": "calibrate_kv"}, added=coarse)
    outputs = {}
    for kind in (None, "bf16", "fp8_unit", "fp8"):
        config = CONFIG.model_copy(update={"kv_cache": kind})
        (tmp_path / str(kind)).mkdir()
        _, output = run(config, tmp_path / "model", tests, tmp_path / str(kind))
        evaluation = json.loads((output / "evaluation.json").read_text())
        assert (evaluation["kv_cache"], evaluation["steps"]) == (kind, [{"stage": "calibrate_kv"}])
        outputs[kind] = (output / "samples.jsonl").read_text()
    assert outputs["fp8"] not in (outputs[None], outputs["bf16"], outputs["fp8_unit"])


def test_fp8_needs_scales_that_are_numbers(tiny_parent: Path, tests: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"kv_cache": "fp8"})
    with pytest.raises(ConfigError, match=r"no model.layers.0.self_attn.k_scale; run calibrate_kv"):
        run(config, tiny_parent, tests, tmp_path)
    broken = kv_cache.scale_tensors([kv_cache.KvScales(1.0, 0.0)] * 4)
    rewrite_checkpoint(Checkpoint.open(tiny_parent), tmp_path / "model", {}, {"stage": "x"}, added=broken)
    with pytest.raises(ArtifactError, match=r"v_scale is .*a scale is one positive number"):
        run(config, tmp_path / "model", tests, tmp_path)


def test_bad_inputs_are_refused(tiny_parent: Path, tests: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file or directory"):
        run(CONFIG, tiny_parent, tmp_path / "absent.jsonl", tmp_path)
    with pytest.raises(ConfigError, match="does not fit the model's 512 positions"):
        run(CONFIG.model_copy(update={"max_new_tokens": 600}), tiny_parent, tests, tmp_path)
    assert not list((tmp_path / "output").iterdir())

"""Evaluation and traces through a server: what they have in common with those in process, on a model that reasons."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from transformers import PreTrainedModel

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.deploy.engines import Server, ServerSpec, served_replies
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.process import load
from moesaic.measure.evaluate import run as evaluate
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.recover.generate_traces import run as generate_traces
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.generate_traces.traces import read_traces
from tests.closeness import assert_decided
from tests.deploy.test_server import Running

REASONER = Path("examples/tiny_reasoner")
EVALUATE = EvaluateConfig(
    efforts=("low", "high"), problems_per_task=1, max_new_tokens=96, batch_size=16, kv_cache="bf16"
)
TRACES = GenerateTracesConfig(max_prompts=8, max_new_tokens=96, held_out_share=0.3, batch_size=5)
PAYLOAD = ("evaluation.json", "samples.jsonl")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running(load(REASONER / "parent", "reasoner", "bf16", "float32", ServerLimits(max_context=10**6)))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reasoner's own, and some of them again as mathematics."""
    lines = [json.loads(line) for line in (REASONER / "data/test.jsonl").read_text().splitlines()]
    sums = [line for line in lines if line["task"] == "chain"][:2]
    lines += [line | {"id": f"math-{line['id']}", "task": "math", "verifier": "math"} for line in sums]
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def running(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """The server by the variable that names it."""
    monkeypatch.setenv("MOESAIC_SERVER_URL_MODEL", f"{server.url}/v1")
    return server


def run_evaluate(directory: Path, problems: Path, **changes: Any) -> dict[str, float]:
    for name in ("output", "scratch"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return evaluate.run(
        EVALUATE.model_copy(update=changes),
        model=REASONER / "parent",
        tests=problems,
        output=directory / "output",
        scratch=directory / "scratch",
    )


def read_samples(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "output/samples.jsonl").read_text().splitlines()]


def run_traces(directory: Path, **changes: Any) -> Path:
    for name in ("output", "scratch"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    generate_traces.run(
        TRACES.model_copy(update=changes),
        model=REASONER / "parent",
        prompts=REASONER / "data/prompts.jsonl",
        output=directory / "output",
        scratch=directory / "scratch",
    )
    return directory / "output"


def check_all_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every reply that an evaluation makes in this process."""
    real = evaluate.generate_batches

    def checked(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *rest: Any) -> Iterator[Any]:
        for batch in real(model, prompts, *rest):
            for index, reply in batch:
                assert_decided(model, prompts[index], reply.token_ids)
            yield batch

    monkeypatch.setattr(evaluate, "generate_batches", checked)


def test_evaluation_through_our_server_finds_what_evaluation_in_process_finds(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy replies of a trained model in float32 do not depend on the batch: all bytes are the same."""
    check_all_decided(monkeypatch)
    here = run_evaluate(tmp_path / "here", problems)
    served = run_evaluate(tmp_path / "served", problems, engine="moesaic")
    assert served == here
    for name in PAYLOAD:
        assert (tmp_path / "served/output" / name).read_text() == (tmp_path / "here/output" / name).read_text()
    assert here["accuracy_high"] > 0.9 and here["accuracy_high_math"] == 1
    assert [here[f"tokens_per_request_{effort}"] for effort in EVALUATE.efforts] == [
        pytest.approx(fmean(line["tokens"] for line in read_samples(tmp_path / "served") if line["effort"] == effort))
        for effort in EVALUATE.efforts
    ]


def test_replies_that_are_cut_off_count_as_in_process(running: Running, problems: Path, tmp_path: Path) -> None:
    """At most 12 tokens: at high effort no reply is whole, and none is right."""
    here = run_evaluate(tmp_path / "here", problems, max_new_tokens=12)
    assert run_evaluate(tmp_path / "served", problems, max_new_tokens=12, engine="running") == here
    assert here["truncated_high"] == 1 and here["accuracy_high"] == 0 and here["tokens_per_request_high"] == 12
    for name in PAYLOAD:
        assert (tmp_path / "served/output" / name).read_text() == (tmp_path / "here/output" / name).read_text()


def test_a_lost_chunk_of_samples_comes_back(running: Running, problems: Path, tmp_path: Path) -> None:
    changes = {"engine": "running", "efforts": ("low",), "batch_size": 5, "problems_per_task": 2}
    before = running.batcher.num_generated
    metrics = run_evaluate(tmp_path, problems, **changes)
    samples = read_samples(tmp_path)
    assert running.batcher.num_generated - before == sum(line["tokens"] for line in samples)
    before = running.batcher.num_generated
    (tmp_path / "scratch/samples-low.jsonl").unlink()
    (tmp_path / "scratch/samples-low-000001.jsonl").unlink()
    assert run_evaluate(tmp_path, problems, **changes) == metrics
    assert read_samples(tmp_path) == samples
    assert running.batcher.num_generated - before == sum(line["tokens"] for line in samples[5:10])


def test_epochs_are_different_and_the_same_again(running: Running, problems: Path, tmp_path: Path) -> None:
    changes = {"engine": "running", "epochs": 3, "temperature": 2.0, "efforts": ("low",), "problems_per_task": 1}
    metrics = run_evaluate(tmp_path / "one", problems, **changes)
    run_evaluate(tmp_path / "two", problems, **changes)
    lines = read_samples(tmp_path / "one")
    assert [(line["task"], line["epoch"]) for line in lines[:4]] == [("add", 1), ("add", 2), ("add", 3), ("chain", 1)]
    assert len({(line["id"], line["output"]) for line in lines}) > 7  # at low effort some families are guesses
    assert metrics["accuracy_low"] == pytest.approx(sum(line["correct"] for line in lines) / 21)
    evaluation = json.loads((tmp_path / "one/output/evaluation.json").read_text())
    assert evaluation["efforts"]["low"]["tasks"]["add"]["solved"].keys() == {"add-000"}
    for name in PAYLOAD:
        assert (tmp_path / "one/output" / name).read_text() == (tmp_path / "two/output" / name).read_text()


def test_traces_of_a_server_are_those_of_the_process(running: Running, tmp_path: Path) -> None:
    here, served = run_traces(tmp_path / "here"), run_traces(tmp_path / "served", engine="running")
    for trace in read_traces(here):
        assert_decided(running.served.model, trace.prompt_ids, trace.reply_ids)
    for name in ("traces.jsonl", "summary.json"):
        assert (served / name).read_text() == (here / name).read_text()


@contextmanager
def server_in_a_thread(engine: str, spec: ServerSpec, log: Path, timeout_s: float) -> Iterator[Server]:
    """Our server without the process, which the evaluation above starts."""
    running = Running(load(spec.directory, spec.role, "bf16", "float32", ServerLimits(max_context=10**6)))
    yield Server(running.url, spec.role, None, log, engine)
    running.stop()


def test_a_checkpoint_is_made_a_bundle_first_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_replies, "started_server", server_in_a_thread)
    bundle = ExportEngineConfig(target="vllm", kv_cache="bf16", compare_outputs=False)
    here = run_traces(tmp_path / "here", efforts=("low",))  # all decided, as the test before this one shows
    served = run_traces(tmp_path / "served", efforts=("low",), engine="moesaic", bundle=bundle)
    assert (served / "traces.jsonl").read_text() == (here / "traces.jsonl").read_text()
    assert (tmp_path / "served/scratch/bundle/serve.args").is_file()
    with pytest.raises(ConfigError, match="the bundle's kv_cache is 'fp8', this kv_cache 'bf16'"):
        EvaluateConfig.parse('{"engine": "vllm", "kv_cache": "bf16", "bundle": {"target": "vllm"}}')


def test_sampled_traces_follow_from_the_seed_and_a_lost_chunk_comes_back(running: Running, tmp_path: Path) -> None:
    changes = {"engine": "running", "samples_per_prompt": 2, "temperature": 2.0, "efforts": ("low",)}
    output = run_traces(tmp_path / "one", **changes)
    text, before = (output / "traces.jsonl").read_text(), running.batcher.num_generated
    traces = read_traces(output)
    assert len({trace.reply_ids for trace in traces}) > len({trace.id for trace in traces})
    lost = tmp_path / "one/scratch/traces-low-000001.jsonl"
    tokens = sum(len(json.loads(line)["reply_ids"]) for line in lost.read_text().splitlines())
    lost.unlink()
    assert (run_traces(tmp_path / "one", **changes) / "traces.jsonl").read_text() == text
    assert running.batcher.num_generated - before == tokens
    other = run_traces(tmp_path / "other", **changes, seed=1) / "traces.jsonl"
    assert other.read_text() != text


def test_what_cannot_be_asked_is_refused_before_anything_starts(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOESAIC_SERVER_URL_MODEL", raising=False)
    with pytest.raises(ConfigError, match="set MOESAIC_SERVER_URL_MODEL"):
        run_evaluate(tmp_path, problems, engine="running")
    with pytest.raises(ConfigError, match="run calibrate_kv"):
        run_evaluate(tmp_path, problems, engine="moesaic", kv_cache="fp8")
    with pytest.raises(ConfigError, match="does not fit the model's 4096 positions"):
        run_evaluate(tmp_path, problems, engine="moesaic", max_new_tokens=4096)
    with pytest.raises(ArtifactError, match=r"holds no serve.args; .* give a bundle of export_engine"):
        run_traces(tmp_path, engine="vllm")
    monkeypatch.setattr("moesaic.deploy.engines.completions.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs the package openai; pip install 'moesaic\[evaluate\]'"):
        run_evaluate(tmp_path, problems, engine="moesaic")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"epochs": 2}', "epochs above 1 need a temperature"),
        ('{"engine": "moesaic"}', "say how, such as kv_cache bf16"),
        ('{"engine": "tgi"}', "engine = 'tgi'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvaluateConfig.parse(config)

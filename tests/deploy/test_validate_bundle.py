"""The comparison of an engine's replies with the reference, by hand; the engine itself is asked in test_vllm_engine."""

import json
import math
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import ArtifactError
from moesaic.deploy.engines.vllm import engine
from moesaic.deploy.engines.vllm.engine import EngineReply, LoadedBundle, LoadedLayer
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.validate_bundle import run as stage
from moesaic.deploy.validate_bundle.conformance import Agreement, JudgedReply, compare, judge
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import Sampling, generate, stop_ids
from moesaic.models.whole_model import load_model

TINY = Path(stage.__file__).parents[2] / "pipelines" / "tiny_reasoner"


def test_a_gap_is_what_the_reference_would_have_gained() -> None:
    """p = (1/2, 1/4, 1/4) twice; the engine took the first, then the second, and was sure of it."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).mul(math.log(2)).expand(2, 3)
    judged = compare(logits, torch.tensor([0, 1]), torch.tensor([math.log(0.5), math.log(0.5)]))
    assert judged.gaps == pytest.approx((0.0, math.log(2)))
    assert judged.logprob_differences == pytest.approx((0.0, math.log(2)), abs=1e-6)


def test_replies_are_counted_equal_and_agreeing() -> None:
    replies = [JudgedReply((0.0, 0.0), (0.1, 0.3)), JudgedReply((0.0, 0.5), (0.0, 0.0)), JudgedReply((2.0,), (0.6,))]
    agreement = Agreement.of(replies, near_tie=0.5)
    assert (agreement.replies, agreement.equal, agreement.agreeing, agreement.tokens) == (3, 1, 2, 5)
    assert agreement.largest_gap == 2.0
    assert agreement.mean_logprob_difference == pytest.approx(0.2)


def test_a_reply_is_the_references_if_and_only_if_decoding_gives_it() -> None:
    model = load_model(TINY / "parent")
    prompt = [7, 8, 9, 10, 11, 12]
    (reply,) = generate(model, [prompt], Sampling(24, stop_ids(model)), 1)
    ids = list(reply.token_ids)
    assert not any(judge(model, prompt, ids, [0.0] * len(ids)).gaps)
    changed = [*ids[:-1], (ids[-1] + 1) % 256]
    *before, last = judge(model, prompt, changed, [0.0] * len(ids)).gaps
    assert not any(before)
    assert last > 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("validate") / "bundle"
    config = ExportEngineConfig(target="vllm", kv_cache="bf16", compare_outputs=False)
    write_bundle(Checkpoint.open(TINY / "parent"), directory, config)
    return directory


def loaded(bundle: Path, replies: list[EngineReply]) -> LoadedBundle:
    layers = BundleManifest.read(bundle).layers
    return LoadedBundle(
        "vLLM 0 (CPU)",
        True,
        tuple(LoadedLayer(one.num_local_experts, 2, 64, one.sliding_window, 2, 1.0, 1.0) for one in layers),
        tuple(replies),
    )


CONFIG = ValidateBundleConfig(efforts=("low",), prompts_per_effort=2, max_new_tokens=4)


def test_what_the_engine_says_is_the_verdict(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's answers are made up here, so that each kind of them is met."""
    wrong = loaded(bundle, [EngineReply((3, 5), (-9.0, -9.0))] * 2)
    monkeypatch.setattr(stage, "load", lambda *_: wrong)
    verdict = stage.validate_by_engine(CONFIG, bundle, TINY / "data" / "prompts.jsonl", tmp_path)
    assert (verdict.passed, verdict.loaded_by) == (False, "vLLM 0 (CPU)")
    assert any("0 of 2 replies are the reference's but for near ties" in problem for problem in verdict.problems)
    assert any("log-probabilities differ" in problem for problem in verdict.problems)

    fewer = LoadedBundle(wrong.engine, True, (LoadedLayer(3, 1, 32, 32, 2, 1.0, 1.0), *wrong.layers[1:]), wrong.replies)
    monkeypatch.setattr(stage, "load", lambda *_: fewer)
    alone = CONFIG.but(compare_replies=False)
    verdict = stage.validate_by_engine(alone, bundle, TINY / "data" / "prompts.jsonl", tmp_path)
    assert verdict.problems == (
        "layer 0: num_local_experts is 3 in the engine, 16 in the bundle",
        "layer 0: num_experts_per_tok is 1 in the engine, 2 in the bundle",
        "layer 0: intermediate_size is 32 in the engine, 64 in the bundle",
    )

    def refuse(*_: object) -> LoadedBundle:
        raise ArtifactError("vLLM does not take the bundle: the checkpoint has no weights for x")

    monkeypatch.setattr(stage, "load", refuse)
    (tmp_path / "output").mkdir()
    metrics = stage.run(
        alone, bundle=bundle, prompts=TINY / "data" / "prompts.jsonl", output=tmp_path / "output", scratch=tmp_path
    )
    assert metrics == {"loaded": 1.0, "passed": 0.0}
    written = json.loads((tmp_path / "output" / "verdict.json").read_text())
    assert written["verdict"].startswith("wrong by vLLM: vLLM does not take the bundle")


def test_without_an_engine_for_this_machine_a_bundle_is_unverified(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "why_unsupported", lambda fp8_cache: "it is built for Linux")
    verdict = stage.validate_by_engine(CONFIG, bundle, TINY / "data" / "prompts.jsonl", tmp_path)
    words = "unverified: files and layout checked; vLLM was not asked: it is built for Linux"
    assert (verdict.passed, verdict.words) == (True, words)


def test_a_cpu_gets_a_cache_that_holds_the_longest_request(bundle: Path) -> None:
    """2 bytes * 2 for padding * 8 layers * (K and V of 2 heads of 32) * 4096 positions; or what is in flight."""
    arguments = engine._arguments(bundle, 100, on_cpu=True)
    assert arguments[-2:] == ["--kv-cache-memory-bytes", str(2 * 2 * 8 * 128 * 4096)]
    assert engine._arguments(bundle, 5000, on_cpu=True)[-1] == str(2 * 2 * 8 * 128 * 5000)
    assert engine.variables(bundle)["PYTHONPATH"] == str(bundle / "vllm_plugin")

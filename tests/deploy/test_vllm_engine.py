"""vLLM itself loads and serves bundles of the tiny reasoner and of a child of it whose layers differ.

Nothing is replaced: the engine is the one of `moesaic.deploy.engines.vllm`, in its own environment. The wrong bundles
show that the checks can fail: each is refused by the engine, or found to answer otherwise.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.core.own_environment import own_variables
from moesaic.data.calibration import load_batches
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import read_problems, render_prompt, spread_over_tasks
from moesaic.deploy.engines import ServerSpec, check_available, started_server
from moesaic.deploy.engines.completions import Completion, RequestSettings, complete
from moesaic.deploy.engines.vllm.engine import load
from moesaic.deploy.engines.vllm.environment import vllm_environment, why_unsupported
from moesaic.deploy.export_engine.bundle import write_bundle, write_vllm_plugin
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.deploy.validate_bundle.conformance import judge
from moesaic.deploy.validate_bundle.run import validate_by_engine
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig
from moesaic.models import kv_cache, layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.channel_orders import read_channels
from moesaic.models.checkpoint import Checkpoint, layer_shards, write_checkpoint
from moesaic.models.families.gpt_oss import GPT_OSS
from moesaic.models.generation import read_stop_ids
from moesaic.models.stage_outputs import read_orders
from moesaic.models.whole_model import load_model
from moesaic.pipelines import example
from moesaic.recover.calibrate_kv import run as calibrate_kv
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.search.prune_model.pruning import kept_channels, kept_experts, prune_stored
from moesaic.search.rank_experts import run as rank_experts
from moesaic.search.rank_experts.stage import RankExpertsConfig

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_unsupported()), reason=f"no vLLM here: {why_unsupported()}"),
]
without_fp8 = pytest.mark.skipif(bool(why_unsupported(fp8_cache=True)), reason=f"{why_unsupported(fp8_cache=True)}")

PROMPTS = example() / "data" / "prompts.jsonl"
BLOCKS = Architecture.of(
    [
        Block(16, 2, 64, 32),
        Block(14, 2, 64, 256),
        Block(15, 2, 64, 32),
        Block(12, 2, 64),
        Block(16, 2, 64, 64),
        Block(13, 2, 64, 256),
        Block(15, 2, 64, 32),
        Block(14, 2, 64),
    ]
)
"""A gentle child: what it says is nearly what the reasoner says, so that rounding changes few of its tokens."""
SPARSER = Architecture.of(
    replace(block, experts_per_token=1 if layer in (2, 5) else 2, expert_width=32 if layer in (3, 5, 6) else 64)
    for layer, block in enumerate(BLOCKS.blocks)
)
"""The same where two layers use one expert per token, and three have experts of half the width."""
ASKED = ValidateBundleConfig(prompts_per_effort=60)
BRIEFLY = ASKED.but(efforts=("high",), prompts_per_effort=40)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reasoner and the child, both with calibrated scales, and a child with other experts per token."""
    root, data = tmp_path_factory.mktemp("engine"), example() / "data"
    parent = Checkpoint.open(example() / "parent")
    for name in ("ranking", "scratch", "calibrated-parent", "calibrated-child"):
        (root / name).mkdir()
    short = data / "calibration_short.jsonl"
    config = RankExpertsConfig(max_sequences=16, max_tokens=512)
    rank_experts.run(
        config, parent=parent.directory, calibration_short=short, output=root / "ranking", scratch=root / "scratch"
    )
    write_child(parent, root / "child", root / "ranking", BLOCKS)
    write_child(parent, root / "sparser", root / "ranking", SPARSER)
    for name, model in (("parent", parent.directory), ("child", root / "child")):
        calibrate_kv.run(
            CalibrateKvConfig(max_sequences=16, max_tokens=512, precision="float32"),
            model=model,
            calibration=short,
            output=root / f"calibrated-{name}",
            scratch=root / "scratch",
        )
    return {name: root / f"calibrated-{name}" for name in ("parent", "child")} | {"sparser": root / "sparser"}


def write_child(parent: Checkpoint, directory: Path, ranking: Path, blocks: Architecture) -> None:
    orders = read_orders(ranking / "ranking.json", parent.architecture)
    channels = read_channels(ranking, parent.architecture)

    def shards() -> Iterator[tuple[str, dict[str, Any]]]:
        yield "model-outer", {name: parent.stored(name) for name in layout.outer_specs(parent.shape)}
        for layer, block in enumerate(blocks.blocks):
            tensors = {name: parent.stored(name) for name in parent.layer_names(layer)}
            kept = list(kept_experts(orders[layer], block.num_experts))
            narrower = block.expert_width < parent.architecture.blocks[layer].expert_width
            best = kept_channels(channels[layer][kept], block.expert_width) if narrower else None
            yield from layer_shards(layer, prune_stored(tensors, kept, best)[0])

    kept_files = [path for path in parent.directory.iterdir() if path.name.startswith(("tokenizer", "chat", "gener"))]
    write_checkpoint(directory, layout.child_config(parent.config, blocks), shards(), kept_files)


@pytest.fixture(scope="session")
def bundle_of(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a bundle of a model, once for the same settings."""
    made: dict[str, Path] = {}

    def make(name: str, **settings: Any) -> Path:
        config = ExportEngineConfig(target="vllm", compare_outputs=False, max_batch_size=64).but(**settings)
        key = f"{name} {config.digest}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / name
            write_bundle(Checkpoint.open(models[name]), made[key], config)
        return made[key]

    return make


@pytest.mark.parametrize(
    ("name", "cache"),
    [("parent", "bf16"), ("child", "bf16"), pytest.param("child", "fp8", marks=without_fp8)],
)
def test_as_it_serves_the_engine_replies_as_transformers_does_but_for_rounding(
    name: str, cache: str, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    verdict = validate_by_engine(ASKED, bundle_of(name, kv_cache=cache), PROMPTS, tmp_path)
    assert verdict.passed, verdict.problems
    assert verdict.loaded_by is not None
    assert verdict.words.startswith("verified by vLLM")
    assert all(agreement["equal"] >= 0.9 * agreement["replies"] for agreement in verdict.replies.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the engine computes MXFP4 models in BF16 alone")
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("child", "bf16"),
        ("sparser", "bf16"),
        pytest.param("parent", "fp8", marks=without_fp8),
        pytest.param("child", "fp8_unit", marks=without_fp8),
    ],
)
def test_in_float32_its_replies_are_those_of_transformers(
    name: str, cache: str, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    """At every effort at least 99 % of them, token for token.

    With an FP8 cache 95 %: sums in another order differ by 1e-7, which may put a value on the other side of a step.
    """
    equal, closest = (0.99, 1e-5) if cache == "bf16" else (0.95, 1e-3)
    asked = ASKED.but(engine_precision="float32")
    verdict = validate_by_engine(asked, bundle_of(name, kv_cache=cache), PROMPTS, tmp_path)
    assert verdict.passed, verdict.problems
    for effort, agreement in verdict.replies.items():
        assert agreement["equal"] >= equal * agreement["replies"], (effort, agreement)
        assert agreement["mean_logprob_difference"] < closest, (effort, agreement)


@pytest.fixture
def newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The newest vLLM that the plugin is written to: its own Python, on the compiled CPU kernels of the oldest.

    The registry has it built for GPUs alone.
    """
    version, folder = "0.33.0", tmp_path / "newest"
    python = vllm_environment().find_program()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*pip, f"vllm=={version}"], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("vllm-*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if not name.endswith(".so")])
    (kernels,) = python.parents[1].glob("lib/python*/site-packages/vllm")
    for library in kernels.glob("*.so"):
        (folder / "vllm" / library.name).symlink_to(library)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nVLLM_TARGET_DEVICE=cpu PYTHONPATH="$PYTHONPATH:{folder}" exec {python} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("MOESAIC_VLLM", str(program))
    return version


def test_the_newest_engine_replies_likewise(newest: str, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    verdict = validate_by_engine(BRIEFLY, bundle_of("child", kv_cache="bf16"), PROMPTS, tmp_path)
    assert verdict.passed, verdict.problems
    assert verdict.loaded_by == f"vLLM {newest} (CPU)"


def test_long_prompts_in_chunks_and_from_the_prefix_cache(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    """Beyond every window, 256 tokens of a step, each prompt twice: the second time its start is in the cache."""
    bundle = bundle_of("child", kv_cache="bf16", max_batch_size=8, max_num_tokens=256, prefix_reuse=True)
    calibration = example() / "data" / "calibration_long.jsonl"
    batches = load_batches(calibration, bundle, max_sequences=4, max_tokens=1500, batch_tokens=1500)
    prompts = [
        row[kept].tolist() for batch in batches for row, kept in zip(batch.token_ids, batch.is_token, strict=True)
    ]
    assert min(map(len, prompts)) > max(block.window or 0 for block in BLOCKS.blocks)
    found = load(bundle, prompts * 2, sorted(read_stop_ids(bundle)), 24, tmp_path, 600)
    model = load_model(bundle)
    kv_cache.emulate(model, kv_cache.roundings("bf16", [kv_cache.UNIT] * len(BLOCKS.blocks)))
    for prompt, reply in zip(prompts * 2, found.replies, strict=True):
        judged = judge(model, prompt, reply.token_ids, reply.logprobs)
        assert max(judged.gaps) <= ASKED.near_tie
        assert sum(judged.logprob_differences) / len(reply.token_ids) <= ASKED.max_logprob_difference


def test_a_server_answers_64_requests_at_once_and_again_after_a_restart(
    bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = bundle_of("child", kv_cache="bf16")
    spec = ServerSpec("model", bundle, "bf16", "bfloat16", max_requests=64, max_cache_tokens=64 * 256)
    check_available("vllm", spec)
    tokenizer, effort = load_tokenizer(bundle), "high"
    problems = spread_over_tasks(read_problems(PROMPTS), 64)
    prompts = [tuple(render_prompt(problem, tokenizer, effort)) for problem in problems]
    wanted = [Completion(problem.id, prompt, 64, 0.0, 0) for problem, prompt in zip(problems, prompts, strict=True)]
    settings = RequestSettings(read_stop_ids(bundle), 64, 300.0)
    model = load_model(bundle)
    agreeing = []
    for start in ("first", "second"):
        with started_server("vllm", spec, tmp_path / f"{start}.log", 600.0) as server:
            before = server.counts()
            replies = dict(complete(server, wanted, settings))
            after = server.counts()
        assert after["requests"] - before["requests"] == 64
        assert after["output_tokens"] - before["output_tokens"] == sum(reply.num_tokens for reply in replies.values())
        gaps = [
            max(judge(model, prompts[index], reply.token_ids, [0.0] * reply.num_tokens).gaps)
            for index, reply in replies.items()
        ]
        agreeing.append(sum(gap <= ASKED.near_tie for gap in gaps))
    assert min(agreeing) >= 63


def test_a_seeded_reply_depends_on_its_seed_and_not_on_how_its_prompt_was_cut(
    bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Steps of 64 tokens cut every prompt, of which an engine on CPUs would die. Rounding changes some replies."""
    whole = bundle_of("child", kv_cache="bf16")
    prompts = torch.randint(6, 64, (24, 100), generator=torch.Generator().manual_seed(2)).tolist()
    settings = RequestSettings(read_stop_ids(whole), 8, 300.0)
    said: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for step_tokens in (64, 2048):
        bundle = bundle_of("child", kv_cache="bf16", max_batch_size=8, max_num_tokens=step_tokens)
        spec = ServerSpec("model", bundle, "bf16", "bfloat16", max_requests=8, max_cache_tokens=8 * 256)
        with started_server("vllm", spec, tmp_path / f"{step_tokens}.log", 600.0) as server:
            for seed in (1, 2):
                wanted = [Completion(str(place), tuple(prompt), 12, 2.0, seed) for place, prompt in enumerate(prompts)]
                replies = dict(complete(server, wanted, settings))
                said[step_tokens, seed] = [replies[place].token_ids for place in range(len(wanted))]

    def alike(one: tuple[int, int], other: tuple[int, int]) -> int:
        return sum(ours == theirs for ours, theirs in zip(said[one], said[other], strict=True))

    assert alike((64, 1), (2048, 1)) >= 18
    assert alike((64, 1), (64, 2)) <= 6


def edit_config(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((bundle / "config.json").read_text())
    change(content)
    (bundle / "config.json").unlink()
    (bundle / "config.json").write_text(json.dumps(content))


def edit_block(bundle: Path, **values: int) -> None:
    """Of layer 1."""

    def change(config: dict[str, Any]) -> None:
        for blocks, layer in ((config["block_configs"], 1), (config["per_layer_config"], "1")):
            blocks[layer].update(values)

    edit_config(bundle, change)


def edit_shard(bundle: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(bundle / name)
    change(tensors)
    (bundle / name).unlink()
    save_file(tensors, bundle / name)
    index = json.loads((bundle / "model.safetensors.index.json").read_text())
    places = {tensor: file for tensor, file in index["weight_map"].items() if file != name}
    index["weight_map"] = places | dict.fromkeys(tensors, name)
    (bundle / "model.safetensors.index.json").unlink()
    (bundle / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_layer(part: str, tensor: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Changes one tensor of layer 1, which has 14 experts, uses 2 per token and has a window of 256."""
    name = f"model.layers.1.{tensor}"
    return lambda bundle: edit_shard(
        bundle,
        f"model-layer-001-{part}.safetensors",
        lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}),
    )


def remove(part: str, tensor: str) -> Callable[[Path], None]:
    return lambda bundle: edit_shard(
        bundle, f"model-layer-001-{part}.safetensors", lambda tensors: tensors.pop(f"model.layers.1.{tensor}")
    )


def rope_factor(config: dict[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        config[key]["factor"] = 2.0


REFUSED = {
    "a missing weight": (remove("rest", "self_attn.k_proj.weight"), "no weights for layers.1.attn.k_proj.weight"),
    "missing experts": (remove("experts", "mlp.experts.down_proj_scales"), "no weights for layers.1.mlp.experts"),
    "a weight too many": (
        lambda bundle: edit_shard(
            bundle,
            "model-layer-001-rest.safetensors",
            lambda tensors: tensors.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(32)}),
        ),
        "this model has not",
    ),
    "experts that the config does not count": (
        lambda bundle: edit_block(bundle, num_local_experts=12),
        "asks for",
    ),
    "an argument that it does not know": (
        lambda bundle: (bundle / "serve.args").write_text((bundle / "serve.args").read_text() + "--windows 256\n"),
        "unrecognized arguments",
    ),
}
OTHERWISE = {
    "experts per token": lambda bundle: edit_block(bundle, num_experts_per_tok=1),
    "a window": lambda bundle: edit_block(bundle, sliding_window=8),
    "experts out of order": edit_layer("experts", "mlp.experts.down_proj_blocks", lambda own: own.flip(0)),
    "a router out of order": edit_layer("rest", "mlp.router.weight", lambda own: own.flip(0)),
    "scales of MXFP4": edit_layer("experts", "mlp.experts.gate_up_proj_scales", lambda own: own + 1),
    "no sinks": edit_layer("rest", "self_attn.sinks", lambda own: own - 30),
    "RoPE": lambda bundle: edit_config(bundle, rope_factor),
}


def damaged(bundle: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    """A copy with one thing wrong; the digests are not looked at here, so it need not be sealed again."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    damage(copy)
    return copy


def asked_of(wrong: Path, right: Path, tmp_path: Path) -> Verdict:
    """What the engine says of a wrong bundle, held against the right one."""
    return validate_by_engine(BRIEFLY, wrong, PROMPTS, tmp_path, reference=right)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_bundle_is_refused_by_the_engine(kind: str, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    """Asked at once: `validate_bundle` would refuse some of them before it asks."""
    damage, reason = REFUSED[kind]
    wrong = damaged(bundle_of("child", kv_cache="bf16"), tmp_path, damage)
    with pytest.raises(ArtifactError, match=f"vLLM does not take the bundle(.|\n)*{reason}"):
        load(wrong, [], [], 1, tmp_path, 600)


@pytest.mark.parametrize("kind", OTHERWISE)
def test_a_wrong_bundle_answers_otherwise(kind: str, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    bundle = bundle_of("child", kv_cache="bf16")
    verdict = asked_of(damaged(bundle, tmp_path, OTHERWISE[kind]), bundle, tmp_path)
    assert not verdict.passed
    assert any("near ties" in problem or "log-probabilities" in problem for problem in verdict.problems)


@without_fp8
def test_scales_that_are_missing_are_refused_and_wrong_ones_are_named(
    bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, name = bundle_of("child", kv_cache="fp8"), "model.layers.1.self_attn.v_scale"
    shard = "model-kv-scales.safetensors"
    missing = damaged(bundle, tmp_path / "a", lambda copy: edit_shard(copy, shard, lambda tensors: tensors.pop(name)))
    with pytest.raises(ArtifactError, match=r"no weights for layers\.1\.attn\.attn\.v_scale"):
        load(missing, [], [], 1, tmp_path, 600)
    wrong = damaged(
        bundle, tmp_path / "b", lambda copy: edit_shard(copy, shard, lambda tensors: tensors[name].mul_(64))
    )
    assert "layer 1: value_scale is" in asked_of(wrong, bundle, tmp_path).problems[0]


def test_a_trainers_weights_come_in_parts_and_unpacked(models: dict[str, Path], tmp_path: Path) -> None:
    """As NeMo-RL sends them to a model that begins with dummies, of a checkpoint whose experts are packed."""
    model = load_model(models["child"], torch.bfloat16)
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, tmp_path / "sent.safetensors")
    tokenizer = load_tokenizer(models["child"])
    prompts = [render_prompt(problem, tokenizer, "low") for problem in read_problems(PROMPTS)[::1200]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    done = subprocess.run(
        [
            vllm_environment().find_program(),
            Path(__file__).with_name("refit_program.py"),
            *(models["child"], tmp_path / "sent.safetensors", tmp_path / "prompts.json"),
        ],
        env=own_variables() | {"PYTHONPATH": str(write_vllm_plugin(tmp_path, GPT_OSS))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    replies = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("[["))
    stops = read_stop_ids(models["child"])
    equal = sum(reply == _greedy(model, prompt, stops, 16) for prompt, reply in zip(prompts, replies, strict=True))
    assert equal >= len(prompts) - 1  # one near tie may be rounded the other way


def _greedy(model: Any, prompt: list[int], stops: set[int], most: int) -> list[int]:
    ids = list(prompt)
    while len(ids) - len(prompt) < most and (len(ids) == len(prompt) or ids[-1] not in stops):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 is for CPUs")
@pytest.mark.parametrize(
    ("model", "first"),
    [("tiny_qwen3", Block(8, 2, 32)), ("tiny_glm4", Block(0, 0, 0, 24))],
)
def test_a_child_of_another_family_is_served(
    model: str, first: Block, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Random weights, so that a wrong layer would change every reply."""
    source: Path = request.getfixturevalue(model)
    parent, directory = Checkpoint.open(source), tmp_path / "child"
    blocks = Architecture.of([first, Block(5, 1, 16, 16), Block(6, 2, 32)])
    order = [3, 1, 7, 0, 2, 6, 5, 4]

    def shards() -> Iterator[tuple[str, dict[str, Any]]]:
        yield "model-outer", {name: parent.stored(name) for name in layout.outer_specs(parent.shape)}
        for layer, block in enumerate(blocks.blocks):
            tensors = {name: parent.stored(name) for name in parent.layer_names(layer)}
            kept = kept_experts(order, block.num_experts) if block.num_experts else ()
            narrower = 0 < block.expert_width < 32
            channels = torch.arange(block.expert_width).expand(len(kept), -1) if narrower else None
            yield from layer_shards(layer, prune_stored(tensors, kept, channels)[0])

    write_checkpoint(directory, layout.child_config(parent.config, blocks), shards(), source.glob("*ken*"))
    config = ExportEngineConfig(target="vllm", kv_cache="bf16", max_batch_size=8, max_seq_len=128)
    write_bundle(Checkpoint.open(directory), tmp_path / "bundle", config)
    prompts = torch.randint(6, 64, (8, 40), generator=torch.Generator().manual_seed(2)).tolist()
    loaded = load(tmp_path / "bundle", prompts, [5], 24, tmp_path, 600, "float32")
    found = [
        Block(one.num_local_experts, one.num_experts_per_tok, one.intermediate_size, one.sliding_window)
        for one in loaded.layers
    ]
    assert found == list(blocks.blocks)
    reference = load_model(directory)
    for prompt, reply in zip(prompts, loaded.replies, strict=True):
        judged = judge(reference, prompt, reply.token_ids, reply.logprobs)
        assert max(judged.gaps) < 1e-3
        assert max(judged.logprob_differences) < 1e-3

    lacking = tmp_path / "bundle" / "model-layer-001-experts.safetensors"
    tensors = load_file(lacking)
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    lacking.unlink()
    save_file(tensors, lacking, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"no weights for model\.layers\.1\.mlp\.experts\.4\.up_proj"):
        load(tmp_path / "bundle", prompts[:1], [5], 4, tmp_path, 600, "float32")

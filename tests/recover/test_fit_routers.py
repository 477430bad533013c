"""fit_routers on tiny models of every family: numbers by hand, a spoilt router found again, and what is handed on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import ArtifactError, StageError
from moesaic.costs.facts import Facts, PipelineTask, pruned_shards
from moesaic.models import layers, loading
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, read_recovery, rewrite_checkpoint
from moesaic.models.layers import RouterScores
from moesaic.models.simulated_memory import peak_of
from moesaic.recover.fit_routers import run as fit_routers
from moesaic.recover.fit_routers.fit import Mixtures, Seen, dense_weights, fit, see
from moesaic.recover.fit_routers.needs import needs
from moesaic.recover.fit_routers.stage import FitRoutersConfig
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig

CONFIG = FitRoutersConfig(tokens=400, batch_tokens=300)
FAMILIES = ("tiny_parent", "tiny_qwen3", "tiny_glm4")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty conversations of words, a tenth of which is held out."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("calibration") / "short.jsonl"
    with path.open("w") as file:
        for _ in range(30):
            question, answer = (
                " ".join(f"w{int(word)}" for word in torch.randint(40, (count,), generator=generator))
                for count in (10, 15)
            )
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"effort": "low", "messages": turns}) + "\n")
    return path


def cut(parent: Path, directory: Path, blocks: Architecture) -> Path:
    """A child with these blocks, which keeps the first experts."""
    directory.mkdir(parents=True, exist_ok=True)
    orders = [{"order": list(range(block.num_experts))} for block in Checkpoint.open(parent).architecture.blocks]
    (directory / "ranking.json").write_text(json.dumps({"layers": orders}))
    candidates = {"puzzle": {"blocks": [block.as_config() for block in blocks.blocks]}}
    (directory / "architecture.json").write_text(json.dumps({"candidates": candidates}))
    given = {"parent": parent, "ranking": directory, "architecture": directory}
    prune_model.run(PruneModelConfig(), **given, output=directory / "child", scratch=directory)
    return directory / "child"


def halved(parent: Path, first: int) -> Architecture:
    """The parent's blocks, with half the experts from some layer on."""
    whole = Checkpoint.open(parent).architecture
    fewer = [
        block if layer < first or block.is_dense else Block(block.num_experts // 2, *block.values[1:])
        for layer, block in enumerate(whole.blocks)
    ]
    return Architecture.of(fewer)


def run(child: Path, parent: Path, calibration: Path, directory: Path, config: FitRoutersConfig = CONFIG):
    (directory / "scratch").mkdir(parents=True)
    output = directory / "output"
    metrics = fit_routers.run(
        config, child=child, parent=parent, calibration=calibration, output=output, scratch=directory / "scratch"
    )
    return Checkpoint.open(output), metrics


def test_a_bias_by_hand(tiny_checkpoint: Checkpoint):
    """Two experts with outputs at right angles, mixed 0.5 to 0.5 and wanted 0.8 to 0.2: biases differ by ln 4."""
    block = layers.slice_block(loading.load_block(tiny_checkpoint, 0), [0, 1])
    layers.router_of(block).bias.zero_()
    layers.router_of(block).top_k = 2
    one = torch.ones(1, dtype=torch.float64)
    mixtures = Mixtures(torch.eye(2, dtype=torch.float64)[None], torch.tensor([[0.8, 0.2]]).double(), 0.68 * one[0])
    scores = RouterScores(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)
    assert float(mixtures.error(dense_weights(scores, 2).double())) == pytest.approx(0.18 / 0.68)
    seen = Seen(torch.zeros(1, tiny_checkpoint.shape.hidden_size), mixtures)
    correction = fit(block, seen, ridge=1e-9)
    assert correction.bias.tolist() == pytest.approx([math.log(2), -math.log(2)], rel=1e-3)
    assert correction.scale.tolist() == [1.0, 1.0], "a logit of 0 has no scale"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_that_of_the_layers_output(family: str, request: pytest.FixtureRequest):
    checkpoint = Checkpoint.open(request.getfixturevalue(family))
    block = loading.load_block(checkpoint, checkpoint.num_layers - 1)
    attended, ended = torch.randn(2, 30, checkpoint.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = see(block, attended, ended)
    mixed = layers.mix(block, attended)
    shared = layers.with_shared(block, seen.normed, torch.zeros_like(attended))
    wanted = ended - attended - shared
    assert seen.error(block) == pytest.approx(float((mixed - ended).square().sum() / wanted.square().sum()), rel=1e-4)


def test_a_spoilt_router_is_found_again(tiny_parent: Path, calibration: Path, tmp_path: Path):
    """All experts are there, so the parent's own router has no error; the window is wider than any sequence."""
    whole = Checkpoint.open(tiny_parent).architecture
    child = cut(tiny_parent, tmp_path, whole.replace(1, replace(whole.blocks[1], window=500)))
    name = "model.layers.1.mlp.router.bias"
    own = Checkpoint.open(child).tensor(name)
    spoilt = own + torch.linspace(-0.5, 0.5, len(own)).to(own)
    rewrite_checkpoint(Checkpoint.open(child), tmp_path / "spoilt", {name: spoilt}, {"stage": "test"})
    _, metrics = run(tmp_path / "spoilt", tiny_parent, calibration, tmp_path / "run")
    assert metrics["error_after_layer_001"] < 0.02 * metrics["error_before_layer_001"]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_routers_change_and_only_for_the_better(
    family: str, calibration: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    parent = request.getfixturevalue(family)
    first = 2
    child = Checkpoint.open(cut(parent, tmp_path, halved(parent, first)))
    fitted, metrics = run(child.directory, parent, calibration, tmp_path / "run")
    table = json.loads((fitted.directory / "router_fit.json").read_text())
    better = [row["layer"] for row in table if row["error_after"] < row["error_before"]]
    assert [row["layer"] for row in table] == list(range(first, child.num_layers))
    assert better
    assert read_recovery(fitted.directory) == [{"stage": "fit_routers", "tokens": 400, "layers": better}]
    assert metrics["error_after"] < metrics["error_before"]
    router = child.shape.family.router
    may_change = {f"model.layers.{layer}.{router}.{part}" for layer in better for part in ("weight", "bias")}
    changed = {name for name in child.files if not torch.equal(child.tensor(name), fitted.tensor(name))}
    assert changed
    assert changed <= may_change
    assert fitted.architecture == child.architecture


def test_a_fit_brings_a_halved_child_closer(tiny_parent: Path, calibration: Path, tmp_path: Path):
    """Measured where nothing was fitted: the states behind the last layer, of other tokens."""
    child = cut(tiny_parent, tmp_path, halved(tiny_parent, 0))
    fitted, _ = run(child, tiny_parent, calibration, tmp_path / "run")
    ids = torch.randint(5, 40, (8, 30), generator=torch.Generator().manual_seed(1))

    def ends(model: Checkpoint) -> torch.Tensor:
        (states,) = loading.embed(model, [ids])
        rotary = loading.rotary(model, ids.shape[1])
        for layer, block in enumerate(model.architecture.blocks):
            states = layers.run_block(loading.load_block(model, layer), states, rotary, block.window)
        return states

    whole = ends(Checkpoint.open(tiny_parent))
    before, after = ((ends(model) - whole).square().sum() for model in (Checkpoint.open(child), fitted))
    assert after < before


def test_without_tokens_or_changes_the_child_is_handed_on(tiny_parent: Path, calibration: Path, tmp_path: Path):
    child = cut(tiny_parent, tmp_path / "child", halved(tiny_parent, 1))
    whole = cut(tiny_parent, tmp_path / "whole", Checkpoint.open(tiny_parent).architecture)
    for name, source, config in (("off", child, FitRoutersConfig()), ("same", whole, CONFIG)):
        given = Checkpoint.open(source)
        handed_on, metrics = run(source, tiny_parent, calibration, tmp_path / name, config)
        assert metrics == {"num_layers": 0.0, "num_layers_better": 0.0}
        weights = [set(checkpoint.files.values()) for checkpoint in (given, handed_on)]
        assert sorted(path.read_bytes() for path in weights[0]) == sorted(path.read_bytes() for path in weights[1])


def test_memory_is_what_is_planned(tiny_parent: Path, calibration: Path, tmp_path: Path):
    child = cut(tiny_parent, tmp_path, halved(tiny_parent, 0))
    config = CONFIG.but(max_sequences=30, max_tokens=60, tokens=1700)
    peak = peak_of(lambda: run(child, tiny_parent, calibration, tmp_path / "run", config)).total
    whole, cut_blocks = (Checkpoint.open(model) for model in (tiny_parent, child))
    facts = Facts(whole.shape, whole.architecture, whole.packed, cut_blocks.architecture, target=None)
    needed = needs(PipelineTask("fit_routers", "fit_routers", config, ()), facts, [pruned_shards(facts, "puzzle")] * 2)
    assert 0.5 < peak / (needed.device_bytes + needed.host_bytes + needed.state_bytes) < 1.05


def test_states_that_are_not_finite_are_refused(tiny_parent: Path, calibration: Path, tmp_path: Path):
    child = Checkpoint.open(cut(tiny_parent, tmp_path, halved(tiny_parent, 1)))
    name = "model.layers.1.post_attention_layernorm.weight"
    huge = torch.full_like(child.tensor(name), 1e38)
    rewrite_checkpoint(child, tmp_path / "huge", {name: huge}, {"stage": "test"})
    with pytest.raises(StageError, match="layer 2: the child's states are not finite"):
        run(tmp_path / "huge", tiny_parent, calibration, tmp_path / "run")


def test_another_model_is_no_child(tiny_parent: Path, tiny_qwen3: Path, calibration: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"is no child of .*: their sizes differ"):
        run(tiny_parent, tiny_qwen3, calibration, tmp_path)


def test_one_conversation_is_too_few(tiny_parent: Path, calibration: Path, tmp_path: Path):
    child = cut(tiny_parent, tmp_path, halved(tiny_parent, 1))
    with pytest.raises(ArtifactError, match="only 1 sequence"):
        run(child, tiny_parent, calibration, tmp_path / "run", CONFIG.but(max_sequences=1))

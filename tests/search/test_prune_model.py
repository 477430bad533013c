"""The child is a standard checkpoint: exact where nothing was cut, loadable everywhere, consistent when it decodes."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models import layout, loading, mxfp4
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.whole_model import load_model
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.pruning import narrow_experts, prune_layer
from moesaic.search.prune_model.stage import PruneModelConfig
from tests.closeness import assert_near, assert_same_replies

MIXED = Architecture.of([Block(8, 2, 32, 8), Block(5, 1, 64, 16), Block(2, 2, 32, 8), Block(8, 1, 64)])
ORDER = [3, 1, 7, 0, 2, 6, 5, 4]
REAP = [4, 5, 6, 2, 0, 7, 1, 3]
CHANNELS = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(expert)) for expert in range(8)])
"""Of every layer the channels of each expert, the best first."""
EXACT = 1e-6
"""Of the largest value: 8 steps of float32, in which norms and rotations stay while all else is float64."""


def _prune(
    parent: Path,
    architecture: Architecture,
    directory: Path,
    candidate: str = "puzzle",
    order: Sequence[int] = ORDER,
    yarn_factor: float | None = None,
) -> Path:
    inputs = {name: directory / name for name in ("ranking", "architecture", "child", "scratch")}
    for path in inputs.values():
        path.mkdir(parents=True)
    (inputs["ranking"] / "ranking.json").write_text(json.dumps({"layers": [{"order": order, "reap": REAP}] * 4}))
    save_file({str(layer): CHANNELS.clone() for layer in range(4)}, inputs["ranking"] / "channels.safetensors")
    blocks = [block.as_config() for block in architecture.blocks]
    (inputs["architecture"] / "architecture.json").write_text(
        json.dumps(
            {
                "candidates": {"puzzle": {"blocks": blocks}, "uniform_reap": {"blocks": blocks, "keeps": "reap"}},
                "skipped": {"uniform": "no uniform fits"},
            }
        )
    )
    prune_model.run(
        PruneModelConfig(candidate=candidate, yarn_factor=yarn_factor),
        parent=parent,
        ranking=inputs["ranking"],
        architecture=inputs["architecture"],
        output=inputs["child"],
        scratch=inputs["scratch"],
    )
    return inputs["child"]


@pytest.fixture(scope="module")
def child(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _prune(tiny_parent, MIXED, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def child_model(child: Path) -> PreTrainedModel:
    return _exact(load_model(child))


def _exact(model: PreTrainedModel) -> PreTrainedModel:
    """In float64, so that rounding never flips a near tie in the router; grouped_mm has no float64 kernel."""
    model.set_experts_implementation("eager")
    return model.double()


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(6, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_identity_child_is_its_parent(tiny_parent: Path, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    same = _prune(tiny_parent, tiny_checkpoint.architecture, tmp_path)
    for shard in tiny_parent.glob("*.safetensors"):
        assert shard.read_bytes() == (same / shard.name).read_bytes()
    tokens = _tokens(2, 40)
    assert_near(load_model(same)(tokens).logits, load_model(tiny_parent)(tokens).logits)


@torch.no_grad()
def test_a_child_computes_with_its_own_yarn_factor(tiny_parent: Path, child: Path, tmp_path: Path) -> None:
    """What reads the child's config gets it: its logits are those of the same child whose config was edited by hand."""
    stretched = _prune(tiny_parent, MIXED, tmp_path / "stretched", yarn_factor=7.0)
    edited = shutil.copytree(child, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    for place in ("rope_scaling", "rope_parameters"):
        assert config[place]["factor"] == 4.0
        config[place]["factor"] = 7.0
    (edited / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(stretched).config == Checkpoint.open(edited).config
    for shard in child.glob("*.safetensors"):
        assert shard.read_bytes() == (stretched / shard.name).read_bytes()
    tokens = _tokens(2, 40)
    logits = load_model(stretched)(tokens).logits
    assert torch.equal(logits, load_model(edited)(tokens).logits)
    assert not torch.allclose(logits, load_model(child)(tokens).logits, rtol=1e-3)
    angles = loading.rotary(Checkpoint.open(stretched), 40, torch.float32, torch.device("cpu"))
    before = loading.rotary(Checkpoint.open(child), 40, torch.float32, torch.device("cpu"))
    scale = (1 + 0.1 * math.log(7)) / (1 + 0.1 * math.log(4))
    assert angles[0][0, 0] == pytest.approx(scale * before[0][0, 0], rel=1e-6), "cosines of position 0 are YaRN's scale"


def test_child_has_the_layout_it_was_asked_for(child: Path, tiny_checkpoint: Checkpoint) -> None:
    written = Checkpoint.open(child)
    assert written.architecture == MIXED
    assert json.loads((child / "pruning.json").read_text())["kept_experts"][1] == [0, 1, 2, 3, 7]
    scales = "model.layers.{}.mlp.experts.down_proj_scales"
    assert [written.shape_of(scales.format(layer)) for layer in (0, 1)] == [[8, 64, 1], [5, 64, 2]]
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    assert torch.equal(written.tensor(name), tiny_checkpoint.tensor(name)[[0, 1, 2, 3, 7]])
    config = json.loads((child / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "yarn"
    total = sum(tensor.num_bytes for tensor in layout.tensor_specs(written.shape, MIXED).values())
    assert json.loads((child / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total


def test_a_candidate_that_keeps_by_reap_is_cut_by_that_order(child: Path, tiny_parent: Path, tmp_path: Path) -> None:
    pruned = _prune(tiny_parent, MIXED, tmp_path, candidate="uniform_reap")
    kept = [json.loads((each / "pruning.json").read_text())["kept_experts"][1:3] for each in (child, pruned)]
    assert kept == [[[0, 1, 2, 3, 7], [1, 3]], [[0, 2, 4, 5, 6], [4, 5]]]


def test_every_tensor_is_its_parents_without_the_other_experts(child: Path, tiny_checkpoint: Checkpoint) -> None:
    """Bytes copied between files against rows taken in memory."""
    written = Checkpoint.open(child)
    kept = json.loads((child / "pruning.json").read_text())["kept_experts"]
    for layer in range(written.num_layers):
        parent = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(layer)}
        expected = prune_layer(parent, kept[layer])
        if MIXED.blocks[layer].expert_width < 64:
            expected, _ = narrow_experts(expected, CHANNELS[kept[layer], :32].sort(-1).values)
        for name, tensor in expected.items():
            assert torch.equal(written.tensor(name), tensor), name
    for name in layout.outer_specs(written.shape):
        assert torch.equal(written.tensor(name), tiny_checkpoint.tensor(name))


@torch.no_grad()
def test_child_equals_the_parent_with_the_other_experts_and_channels_masked(
    child_model: PreTrainedModel, tiny_parent: Path, tiny_checkpoint: Checkpoint
) -> None:
    parent = _exact(load_model(tiny_parent))
    for layer, block in zip(parent.model.layers, MIXED.blocks, strict=True):
        layer.mlp.router.bias[ORDER[block.num_experts :]] = -1e9
        layer.mlp.router.top_k = block.experts_per_token
        if block.expert_width < 64:
            mask_channels(layer.mlp.experts)
    tokens = _tokens(2, 12)  # shorter than the shortest window that changed
    assert_near(child_model(tokens).logits, parent(tokens).logits, EXACT)


def mask_channels(experts: GptOssExperts) -> None:
    """Half of the rows are zero, and the others as MXFP4 stores them, expert by expert."""
    for expert, order in enumerate(CHANNELS):
        kept, masked = order[:32].sort().values, torch.zeros_like(experts.down_proj[expert])
        masked[kept] = mxfp4.dequantize(*mxfp4.quantize(experts.down_proj[expert, kept].T.contiguous())).T.double()
        experts.down_proj[expert] = masked


@torch.no_grad()
def test_windows_limit_what_a_layer_sees(child_model: PreTrainedModel) -> None:
    attention = [layer.self_attn for layer in child_model.model.layers]
    assert [layer.sliding_window for layer in attention] == [8, 16, 8, None]
    tokens = _tokens(1, 40)
    near, far = tokens.clone(), tokens.clone()
    far[0, 0] = (far[0, 0] + 1) % 58 + 6
    hidden = [child_model(ids, output_hidden_states=True).hidden_states for ids in (near, far)]
    # three window layers reach back 7 + 15 + 7 positions together; only the full layer carries the first token further
    difference = [(near - far)[:, 30:].abs().max() for near, far in zip(*hidden, strict=True)]
    assert difference[3] < 1e-12 < 1e-6 < difference[4]


@torch.no_grad()
def test_cached_decode_equals_recompute(child_model: PreTrainedModel) -> None:
    tokens = _tokens(3, 48)
    whole = child_model(tokens).logits
    step = child_model(tokens[:, :20], use_cache=True)
    logits, cache = [step.logits], step.past_key_values
    for position in range(20, 48):
        step = child_model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    assert_near(torch.cat(logits, 1), whole, EXACT)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 15, 7, 48]


@torch.no_grad()
def test_left_padding_changes_nothing(child_model: PreTrainedModel) -> None:
    tokens = _tokens(1, 30)
    padded = torch.cat([torch.zeros(1, 11, dtype=torch.long), tokens], 1)
    mask = (torch.arange(41) >= 11).long()[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = child_model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    beside = child_model.generate(padded, attention_mask=mask, **options)
    replies = [alone[0, 30:].tolist()], [beside[0, 41:].tolist()]
    assert_same_replies(child_model, tokens.tolist(), *replies, tie=EXACT)


@torch.no_grad()
def test_child_loads_in_plain_transformers_with_its_own_code(child: Path, child_model: PreTrainedModel) -> None:
    plain = _exact(AutoModelForCausalLM.from_pretrained(child, dtype=torch.float32, trust_remote_code=True))
    tokens = _tokens(2, 40)
    assert_near(plain(tokens).logits, child_model(tokens).logits, EXACT)
    assert AutoTokenizer.from_pretrained(child).eos_token == "<|return|>"


def test_a_skipped_candidate_is_refused_with_its_reason(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'uniform'.*no uniform fits.*choose one of puzzle"):
        _prune(tiny_parent, MIXED, tmp_path, candidate="uniform")
    assert list((tmp_path / "child").iterdir()) == []


def test_a_ranking_of_another_model_is_refused(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not of the parent"):
        _prune(tiny_parent, MIXED, tmp_path, order=ORDER[:-1])
    assert list((tmp_path / "child").iterdir()) == []


def test_narrower_experts_need_the_order_of_channels(tiny_parent: Path, tmp_path: Path) -> None:
    child = _prune(tiny_parent, MIXED, tmp_path / "first")
    ranking = child.parent / "ranking" / "channels.safetensors"
    given = {name: child.parent / name for name in ("ranking", "architecture", "scratch")}
    save_file({str(layer): CHANNELS[:, 1:].contiguous() for layer in range(4)}, ranking)
    with pytest.raises(ArtifactError, match="is not of the parent given; run rank_experts on this parent"):
        prune_model.run(PruneModelConfig(), parent=tiny_parent, output=tmp_path / "second", **given)
    ranking.unlink()
    with pytest.raises(ArtifactError, match="narrower experts need it: give the output of rank_experts"):
        prune_model.run(PruneModelConfig(), parent=tiny_parent, output=tmp_path / "second", **given)


def test_a_child_larger_than_its_parent_is_refused(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 3"):
        _prune(tiny_parent, MIXED.replace(3, Block(9, 2, 64)), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), ("rope_theta", "rope_scaling"), ("rope_parameters",), ("rope_theta",), None])
def test_child_computes_its_parents_function_however_rope_is_spelt(
    kept: Sequence[str] | None, tiny_parent: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Both in plain transformers; None: every key is there, and null."""
    parent = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    config = json.loads((parent / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        if kept is None:
            config[key] = None if key != "rope_theta" else 150_000.0
        elif key not in kept:
            del config[key]
    (parent / "config.json").write_text(json.dumps(config))
    child = _prune(parent, tiny_checkpoint.architecture, tmp_path / "run")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    models = [
        AutoModelForCausalLM.from_pretrained(place, trust_remote_code=place is child, **options).float()
        for place in (parent, child)
    ]
    tokens = _tokens(2, 40)
    assert_near(models[1](tokens).logits, models[0](tokens).logits)
    assert_near(load_model(child)(tokens).logits, load_model(parent)(tokens).logits)

"""Qwen3-MoE parents as transformers writes them, and their children: read, cut, run, costed from shapes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.costs.block_costs import request_kv_bytes
from moesaic.models import layers, layout, loading
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families import PUBLISHED
from moesaic.models.generation import Sampling, generate
from moesaic.models.simulated_memory import SimulatedLayers, without_values
from moesaic.models.whole_model import load_model
from tests.closeness import assert_near, assert_same_replies
from tests.families import CHANNELS, kept, prune, stream, tokens

MIXED = Architecture.of([Block(8, 2, 32), Block(5, 1, 24, 16), Block(3, 2, 32, 8)])
KEPT = kept(MIXED)


@pytest.fixture(scope="module")
def child(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(tiny_qwen3, MIXED, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def child_model(child: Path) -> PreTrainedModel:
    return load_model(child)


@torch.no_grad()
def test_a_parent_is_read_as_transformers_wrote_it(tiny_qwen3: Path) -> None:
    written = Qwen3MoeForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32, attn_implementation="eager").eval()
    checkpoint = Checkpoint.open(tiny_qwen3)
    assert checkpoint.architecture == Architecture.of([Block(8, 2, 32)] * 3)
    assert not checkpoint.packed and not checkpoint.unused
    assert layout.num_parameters(checkpoint.shape, checkpoint.architecture) == written.num_parameters()
    ids = tokens(2, 40)
    expected = written(ids).logits
    assert expected.std() > 0.5
    assert_near(load_model(tiny_qwen3)(ids).logits, expected)
    assert_near(stream(checkpoint, ids, checkpoint.architecture), expected)


@torch.no_grad()
def test_identity_child_is_its_parent_in_plain_transformers(tiny_qwen3: Path, tmp_path: Path) -> None:
    blocks = Checkpoint.open(tiny_qwen3).architecture
    same, ids = prune(tiny_qwen3, blocks, tmp_path), tokens(2, 40)
    parent = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(same, dtype=torch.float32, trust_remote_code=True)
    assert type(plain).__name__ == "Qwen3MoePuzzleForCausalLM"
    assert_near(plain(ids).logits, parent(ids).logits)
    assert_near(load_model(same)(ids).logits, load_model(tiny_qwen3)(ids).logits)


@torch.no_grad()
def test_a_child_loads_in_plain_transformers(child: Path, child_model: PreTrainedModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        child, dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
    )
    assert_near(plain(tokens(2, 40)).logits, child_model(tokens(2, 40)).logits)


@torch.no_grad()
def test_masked_equals_sliced(tiny_qwen3: Path, child: Path, child_model: PreTrainedModel) -> None:
    """Experts, channels, experts per token and windows, left out of the parent and cut off the child."""
    parent, written, ids = Checkpoint.open(tiny_qwen3), Checkpoint.open(child), tokens(2, 40)
    assert written.architecture == MIXED
    masked = stream(parent, ids, MIXED, masked=True)
    assert_near(stream(written, ids, MIXED), masked)
    assert_near(child_model(ids).logits, masked)
    assert (masked - stream(parent, ids, parent.architecture)).abs().max() > 0.1
    block = loading.load_block(parent, 0)
    (states,) = loading.embed(parent, [ids])
    assert_near(layers.mix_sliced(block, states, KEPT[1], 3), layers.mix(block, states, KEPT[1], 3))
    sliced = layers.slice_block(block, KEPT[1], CHANNELS[KEPT[1], :24])
    assert_near(layers.mix(sliced, states), layers.mix(block, states, KEPT[1], channels=CHANNELS[:, :24]))


def test_kept_experts_are_their_parents_bytes(tiny_qwen3: Path, child: Path) -> None:
    parent, written = Checkpoint.open(tiny_qwen3), Checkpoint.open(child)
    for new, old in enumerate(KEPT[2]):
        for part in ("gate", "up", "down"):
            name = f"model.layers.2.mlp.experts.{{}}.{part}_proj.weight"
            assert torch.equal(written.tensor(name.format(new)), parent.tensor(name.format(old)))
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    kept = CHANNELS[7, :24].sort().values
    assert torch.equal(written.tensor(name.format(4)), parent.tensor(name.format(7))[:, kept])


@torch.no_grad()
def test_cached_decode_equals_recompute(child_model: PreTrainedModel) -> None:
    ids = tokens(3, 48)
    step = child_model(ids[:, :20], use_cache=True)
    logits, cache = [step.logits], step.past_key_values
    for position in range(20, 48):
        step = child_model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    assert_near(torch.cat(logits, 1), child_model(ids).logits)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [48, 15, 7]


def test_batches_of_any_length_generate_what_each_prompt_does_alone(child_model: PreTrainedModel) -> None:
    prompts = [row[:length].tolist() for row, length in zip(tokens(3, 30), (30, 11, 1), strict=True)]
    together = generate(child_model, prompts, Sampling(12, frozenset()), batch_size=3)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [child_model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert_same_replies(child_model, prompts, [list(reply.token_ids) for reply in together], alone)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("Qwen3-30B-A3B", 30_532_122_624, 3.3e9), ("Qwen3-235B-A22B", 235_093_634_560, 22e9)],
)
def test_published_sizes_follow_from_shapes(name: str, parameters: int, active: float) -> None:
    """Of the repositories' safetensors: two bytes a parameter; what a token uses, from the model cards."""
    one = PUBLISHED[name]
    assert layout.num_parameters(one.shape, one.architecture) == parameters
    assert layout.num_bytes(one.shape, one.architecture, packed=False) == 2 * parameters
    used = Architecture.of(Block(block.experts_per_token, 8, block.expert_width) for block in one.architecture.blocks)
    assert layout.num_parameters(one.shape, used) == pytest.approx(active, rel=0.02)
    layers = one.architecture.num_layers
    assert request_kv_bytes(one.shape, one.architecture, 1, "bf16", "moesaic") == layers * 2 * 4 * 128 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False; models of this family compute with True"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "Qwen3-MoE is always 'default'",
        ),
        ({"architectures": ["GptOssForCausalLM"]}, "architectures names"),
        ({"quantization_config": {"quant_method": "fp8"}}, "of the family Qwen3-MoE Moesaic reads plain weights only"),
        ({"model_type": "mixtral"}, "Moesaic reads .*'qwen3_moe_puzzle'"),
        ({"moe_intermediate_size": 16}, "config asks for"),
    ],
)
def test_what_the_family_does_not_compute_is_refused(
    tiny_qwen3: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    broken = shutil.copytree(tiny_qwen3, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ArtifactError, match=message):
        Checkpoint.open(broken)


def test_an_expert_that_is_missing_is_named(tiny_qwen3: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_qwen3, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing.* model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        Checkpoint.open(broken)


def test_rope_without_yarn_has_no_factor(tiny_qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="yarn_factor is 4, but RoPE of this parent is 'default'"):
        prune(tiny_qwen3, MIXED, tmp_path, yarn_factor=4.0)


@torch.no_grad()
def test_a_layer_computes_in_bfloat16_and_without_values(tiny_qwen3: Path) -> None:
    """Norms are then in bfloat16 too, as transformers has them; a simulated layer has the same shapes."""
    checkpoint = Checkpoint.open(tiny_qwen3)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        (hidden,) = loading.embed(checkpoint, [tokens(2, 40)], dtype)
        block, rotary = loading.load_block(checkpoint, 0, dtype), loading.rotary(checkpoint, 40, dtype)
        outputs.append(layers.attend(block, hidden, rotary, None))
        assert layers.run_block(block, hidden, rotary, None).dtype == dtype
    assert_near(outputs[1].float(), outputs[0], 0.02)
    for on_gpu in (False, True):
        with without_values(on_gpu):
            simulated = SimulatedLayers(checkpoint.shape, checkpoint.architecture, False, "bfloat16", on_gpu)
            states = layers.run_block(simulated.load(0), simulated.states(2, 40), simulated.rotary(40), None)
            assert states.shape == (2, 40, 64)

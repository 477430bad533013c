"""GLM-4.5 parents as transformers writes them, and their children: dense layers, shared experts, a sigmoid router."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM, PreTrainedModel

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.costs.block_costs import block_parameters
from moesaic.models import layers, layout, loading
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families import PUBLISHED
from moesaic.models.generation import Sampling, generate
from moesaic.models.layers import DecoderLayer
from moesaic.models.simulated_memory import SimulatedLayers, without_values
from moesaic.models.synthesis import find_model, scale_model, write_synthetic
from moesaic.models.whole_model import load_model
from moesaic.search.measure_costs.engine_timing import write_stack
from moesaic.search.rank_experts.ranking import rank_layer
from tests.closeness import assert_near, assert_same_replies
from tests.families import CHANNELS, kept, prune, stream, tokens

MIXED = Architecture.of([Block(0, 0, 0, 16), Block(5, 1, 24), Block(3, 2, 16, 8)])
KEPT = kept(MIXED)
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def child(tiny_glm4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(tiny_glm4, MIXED, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def child_model(child: Path) -> PreTrainedModel:
    return load_model(child)


@pytest.fixture(scope="module")
def block(tiny_glm4: Path) -> DecoderLayer:
    """The first layer with experts."""
    return loading.load_block(Checkpoint.open(tiny_glm4), 1)


@pytest.fixture
def states() -> Tensor:
    return torch.randn(200, 64, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_a_parent_is_read_as_transformers_wrote_it(tiny_glm4: Path) -> None:
    written = Glm4MoeForCausalLM.from_pretrained(tiny_glm4, dtype=torch.float32, attn_implementation="eager").eval()
    checkpoint = Checkpoint.open(tiny_glm4)
    assert checkpoint.architecture == Architecture.of([Block(0, 0, 0), Block(8, 2, 32), Block(8, 2, 32)])
    assert not checkpoint.packed and not checkpoint.unused
    assert layout.num_parameters(checkpoint.shape, checkpoint.architecture) == written.num_parameters()
    ids = tokens(2, 40)
    expected = written(ids).logits
    assert expected.std() > 0.5
    assert_near(load_model(tiny_glm4)(ids).logits, expected)
    assert_near(stream(checkpoint, ids, checkpoint.architecture), expected)


@torch.no_grad()
def test_identity_child_is_its_parent_in_plain_transformers(tiny_glm4: Path, tmp_path: Path) -> None:
    same, ids = prune(tiny_glm4, Checkpoint.open(tiny_glm4).architecture, tmp_path), tokens(2, 40)
    parent = AutoModelForCausalLM.from_pretrained(tiny_glm4, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(same, dtype=torch.float32, trust_remote_code=True)
    assert type(plain).__name__ == "Glm4MoePuzzleForCausalLM"
    assert plain.config.num_nextn_predict_layers == 0
    assert_near(plain(ids).logits, parent(ids).logits)
    assert_near(load_model(same)(ids).logits, load_model(tiny_glm4)(ids).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_child_loads_in_plain_transformers(child: Path, child_model: PreTrainedModel, attention: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        child, dtype=torch.float32, trust_remote_code=True, attn_implementation=attention
    )
    assert_near(plain(tokens(2, 40)).logits, child_model(tokens(2, 40)).logits)


@torch.no_grad()
def test_masked_equals_sliced(
    tiny_glm4: Path, child: Path, child_model: PreTrainedModel, block: DecoderLayer, states: Tensor
) -> None:
    """Experts, channels, experts per token and windows, left out of the parent and cut off the child."""
    parent, written, ids = Checkpoint.open(tiny_glm4), Checkpoint.open(child), tokens(2, 40)
    assert written.architecture == MIXED
    masked = stream(parent, ids, MIXED, masked=True)
    assert_near(stream(written, ids, MIXED), masked)
    assert_near(child_model(ids).logits, masked)
    assert (masked - stream(parent, ids, parent.architecture)).abs().max() > 0.1
    assert_near(layers.mix_sliced(block, states, KEPT[1], 3), layers.mix(block, states, KEPT[1], 3))
    sliced = layers.slice_block(block, KEPT[1], CHANNELS[KEPT[1], :24])
    assert_near(layers.mix(sliced, states), layers.mix(block, states, KEPT[1], channels=CHANNELS[:, :24]))


def test_what_is_kept_are_the_parents_bytes(tiny_glm4: Path, child: Path) -> None:
    """Corrections go with their experts, in float32; dense layer and shared experts stay whole."""
    parent, written = Checkpoint.open(tiny_glm4), Checkpoint.open(child)
    assert parent.tensors[CORRECTION].dtype == written.tensors[CORRECTION].dtype == "F32"
    assert torch.equal(written.tensor(CORRECTION), parent.tensor(CORRECTION)[KEPT[1]])
    for name in ("0.mlp.down_proj", "1.mlp.shared_experts.up_proj", "2.mlp.shared_experts.down_proj"):
        name = f"model.layers.{name}.weight"
        assert torch.equal(written.tensor(name), parent.tensor(name))
    assert written.config["shared_expert_intermediate_size"] == 32
    assert written.config["moe_intermediate_size"] == 24
    name = "model.layers.2.mlp.experts.{}.down_proj.weight"
    columns = CHANNELS[7, :16].sort().values
    assert torch.equal(written.tensor(name.format(2)), parent.tensor(name.format(7))[:, columns])


@torch.no_grad()
def test_experts_are_chosen_and_weighted_as_transformers_does(block: DecoderLayer, states: Tensor) -> None:
    """The correction takes part in choosing alone."""
    _, weights, expert_ids = block.mlp.gate(states)
    scores = layers.router_scores(block, states)
    ours = scores.choose(2)
    order, expected = ours.argsort(-1), expert_ids.argsort(-1)
    assert torch.equal(ours.gather(1, order), expert_ids.gather(1, expected))
    assert_near(scores.weights(ours, torch.float32).gather(1, order), weights.gather(1, expected))
    uncorrected = scores.log_weights.topk(2).indices.sort(-1).values
    assert (uncorrected != ours.sort(-1).values).any(1).float().mean() > 0.2
    assert_near(layers.mix(block, states) - states, block.mlp(block.post_attention_layernorm(states).unsqueeze(0))[0])


@torch.no_grad()
def test_removal_difference_equals_removing_each_expert(block: DecoderLayer, states: Tensor) -> None:
    """Brute force: slice expert e off the layer, its correction with it, run what is left, compare all tokens."""
    ranking = rank_layer("removal_difference", [layers.route(block, part, num_spare=1) for part in states.split(70)])
    whole = block.mlp(states.unsqueeze(0))
    for expert in range(8):
        rest = layers.slice_block(block, [other for other in range(8) if other != expert])
        expected = (whole - rest.mlp(states.unsqueeze(0))).double().square().mean().item()
        assert ranking.scores[expert] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_cached_decode_equals_recompute(child_model: PreTrainedModel) -> None:
    ids = tokens(3, 48)
    step = child_model(ids[:, :20], use_cache=True)
    logits, cache = [step.logits], step.past_key_values
    for position in range(20, 48):
        step = child_model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    assert_near(torch.cat(logits, 1), child_model(ids).logits)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [15, 48, 7]


def test_batches_of_any_length_generate_what_each_prompt_does_alone(child_model: PreTrainedModel) -> None:
    prompts = [row[:length].tolist() for row, length in zip(tokens(3, 30), (30, 11, 1), strict=True)]
    together = generate(child_model, prompts, Sampling(12, frozenset()), batch_size=3)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [child_model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert_same_replies(child_model, prompts, [list(reply.token_ids) for reply in together], alone)


@pytest.mark.parametrize(
    ("name", "parameters", "total", "active", "published"),
    [
        ("GLM-4.5-Air", 106_852_245_504, 106e9, 12e9, 110.47e9),
        ("GLM-4.5", 352_797_814_784, 355e9, 32e9, 358.34e9),
    ],
)
def test_published_sizes_follow_from_shapes(
    name: str, parameters: int, total: float, active: float, published: float
) -> None:
    """Total and active (without embedding and head) are the card's; the hub counts 110 and 358.34 billion numbers.

    Its files have a layer more, which predicts a second token: like the others, and with three norms, a projection of
    two states, embedding and head again. A GGUF of GLM-4.5-Air with what is like the others has 109.194 billion.
    """
    one = PUBLISHED[name]
    hidden, blocks = one.shape.hidden_size, one.architecture.blocks
    corrections = sum(block.num_experts for block in blocks)
    assert layout.num_parameters(one.shape, one.architecture) == parameters == pytest.approx(total, rel=0.01)
    assert layout.num_bytes(one.shape, one.architecture, packed=False) == 2 * parameters + 4 * corrections
    used = Architecture.of(block if block.is_dense else Block(8, 8, block.expert_width) for block in blocks)
    outer = 2 * one.shape.vocab_size * hidden
    assert layout.num_parameters(one.shape, used) - outer == pytest.approx(active, rel=0.02)
    more = parameters + corrections + block_parameters(one.shape, blocks[-1]) + blocks[-1].num_experts
    assert name != "GLM-4.5-Air" or more == pytest.approx(109.194e9, abs=0.5e6)
    assert more + 3 * hidden + 2 * hidden**2 + outer == pytest.approx(published, abs=5e6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 2, "topk_group": 1}, "n_group is 2; models of this family compute with 1 always"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"first_k_dense_replace": 3}, "no layer has experts"),
        ({"first_k_dense_replace": 2}, r"missing, the first is model\.layers\.1\.mlp\.down_proj"),
        ({"n_shared_experts": 2}, r"shared_experts.* the config asks for \(64, 64\)|shared_experts.*config asks for"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "GLM-4.5 is always 'default'"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures names"),
        ({"quantization_config": {"quant_method": "fp8"}}, "of the family GLM-4.5 Moesaic reads plain weights only"),
    ],
)
def test_what_the_family_does_not_compute_is_refused(
    tiny_glm4: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    broken = shutil.copytree(tiny_glm4, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ArtifactError, match=message):
        Checkpoint.open(broken)


def test_dense_layers_stay(child: Path, tiny_glm4: Path, tmp_path: Path) -> None:
    """Neither is one made of a layer with experts, nor is it one of another family."""
    blocks = Architecture.of([Block(0, 0, 0), Block(0, 0, 0), Block(8, 2, 32)])
    with pytest.raises(ConfigError, match=r"layer 1: block dense/full cannot be cut out of the parent's 8e/top-2/32w"):
        blocks.check_child_of(Checkpoint.open(tiny_glm4).architecture)
    broken = shutil.copytree(child, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["block_configs"][1] = config["block_configs"][0]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="layer 1 has 0 experts; by this config the first 1 layers have none"):
        Checkpoint.open(broken)


def test_the_layer_that_predicts_a_second_token_is_left_out(tiny_glm4: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(tiny_glm4, tmp_path / "whole")
    tensors = load_file(whole / "model.safetensors")
    extra = {f"model.layers.3.{name}": torch.ones(2, 2) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}
    save_file(tensors | extra, whole / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(whole).unused == sorted(extra)
    written = Checkpoint.open(prune(whole, MIXED, tmp_path / "pruned"))
    assert not written.unused
    assert written.config["num_nextn_predict_layers"] == 0
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ArtifactError, match="is of layer 3; the config has layers 0 to 2"):
        Checkpoint.open(whole)


@torch.no_grad()
def test_a_layer_computes_in_bfloat16_and_without_values(tiny_glm4: Path) -> None:
    """Corrections stay in float32; a simulated layer has the same shapes."""
    checkpoint = Checkpoint.open(tiny_glm4)
    (hidden,) = loading.embed(checkpoint, [tokens(2, 40)], torch.bfloat16)
    block, rotary = loading.load_block(checkpoint, 1, torch.bfloat16), loading.rotary(checkpoint, 40, torch.bfloat16)
    assert layers.run_block(block, hidden, rotary, None).dtype == torch.bfloat16
    assert block.mlp.gate.e_score_correction_bias.dtype == torch.float32
    model = load_model(tiny_glm4, torch.bfloat16)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model(tokens(2, 8)).logits.dtype == torch.bfloat16
    for on_gpu in (False, True):
        with without_values(on_gpu):
            simulated = SimulatedLayers(checkpoint.shape, checkpoint.architecture, False, "bfloat16", on_gpu)
            for layer in (0, 1):
                states = layers.run_block(simulated.load(layer), simulated.states(2, 40), simulated.rotary(40), None)
                assert states.shape == (2, 40, 64)


@pytest.mark.parametrize("block", [Block(0, 0, 0, 16), Block(4, 2, 16)])
def test_stacks_of_one_block_are_written_to_be_timed(tiny_glm4: Path, tmp_path: Path, block: Block) -> None:
    write_stack(Checkpoint.open(tiny_glm4), [block] * 2, tmp_path / "stack")
    assert Checkpoint.open(tmp_path / "stack").architecture == Architecture.of([block] * 2)
    assert load_model(tmp_path / "stack")(tokens(1, 8)).logits.isfinite().all()


def test_a_synthetic_one_is_a_checkpoint(tmp_path: Path) -> None:
    model = scale_model(find_model("GLM-4.5-Air"), 1 / 64, num_layers=2, num_experts=8, num_shards=1)
    write_synthetic(model, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.architecture == Architecture.of([Block(0, 0, 0), Block(8, 8, 32)])
    assert checkpoint.tensors[CORRECTION].dtype == "F32"

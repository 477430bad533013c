"""Blocks streamed from a checkpoint compute what transformers' whole model computes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from moesaic.models import layers, layout, loading
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, write_checkpoint
from moesaic.search.prune_model.pruning import narrow_experts, prune_layer
from tests.closeness import assert_near
from tests.layer_states import layer_state


@pytest.fixture(scope="module")
def whole_model(tiny_checkpoint: Checkpoint) -> GptOssForCausalLM:
    """The checkpoint in transformers' own model, eager attention, all weights in memory."""
    config = {
        key: value for key, value in tiny_checkpoint.config.items() if key not in ("quantization_config", "dtype")
    }
    model = GptOssForCausalLM._from_config(GptOssConfig.from_dict(config), attn_implementation="eager").eval()
    state = {name: tiny_checkpoint.tensor(name).float() for name in layout.outer_specs(tiny_checkpoint.shape)}
    for layer in range(tiny_checkpoint.num_layers):
        own = layer_state(tiny_checkpoint, layer)
        state |= {layout.layer_prefix(layer) + name: tensor for name, tensor in own.items()}
    model.load_state_dict(state)
    return model


def random_tokens(rows: int = 2, time: int = 40) -> Tensor:
    return torch.randint(0, 64, (rows, time), generator=torch.Generator().manual_seed(3))


def stream(
    checkpoint: Checkpoint,
    tokens: Tensor,
    kept: list[list[int]] | None = None,
    blocks: Architecture | None = None,
    channels: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits, one layer in memory at a time; with other experts, blocks, and channels of some layers, if given."""
    (hidden,) = loading.embed(checkpoint, [tokens])
    rotary = loading.rotary(checkpoint, tokens.shape[1])
    for layer, block in enumerate((blocks or checkpoint.architecture).blocks):
        module = loading.load_block(checkpoint, layer)
        own = None if kept is None else kept[layer]
        narrow = (channels or {}).get(layer)
        hidden = layers.run_block(module, hidden, rotary, block.window, own, block.experts_per_token, narrow)
    head = loading.load_head(checkpoint)
    return head.logits(head.norm(hidden))


def test_streamed_blocks_equal_the_whole_model(tiny_checkpoint: Checkpoint, whole_model: GptOssForCausalLM):
    tokens = random_tokens()
    with torch.no_grad():
        expected = whole_model(tokens).logits
    assert expected.std() > 0.5
    assert_near(stream(tiny_checkpoint, tokens), expected)


def test_experts_at_once_in_chunks_of_tokens_mix_as_one_after_the_other_do(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU: 40 tokens, 16 at a time."""
    block = loading.load_block(tiny_checkpoint, 0)
    block.self_attn.config._experts_implementation = "grouped_mm"
    (hidden,) = loading.embed(tiny_checkpoint, [random_tokens()])
    expected = layers.mix(block, hidden)
    monkeypatch.setattr(layout, "EXPERT_TOKENS", 16)
    monkeypatch.setattr(layers, "mixture", layers.grouped_mixture)
    assert_near(layers.mix(block, hidden), expected)


def test_right_padding_changes_no_real_token(tiny_checkpoint: Checkpoint):
    tokens = random_tokens(time=40)
    short = stream(tiny_checkpoint, tokens[:, :25])
    assert_near(stream(tiny_checkpoint, tokens)[:, :25], short)


def test_a_puzzle_checkpoint_equals_masking_its_parent(tiny_checkpoint: Checkpoint, tmp_path: Path):
    """A child with 8, 6, 3, 2 experts, 1 or 2 per token, a window and a width per layer, cut out, against masks.

    The channels of layer 1 are a whole group of MXFP4, which loses nothing.
    """
    blocks = Architecture.of([Block(8, 1, 64, 8), Block(6, 2, 32, 4), Block(3, 2, 64, 8), Block(2, 1, 64, None)])
    group = torch.arange(32, 64).expand(8, -1)
    kept = [list(range(8)), [0, 1, 3, 4, 6, 7], [1, 2, 5], [0, 7]]

    def shards():
        yield "model-outer", {name: tiny_checkpoint.tensor(name) for name in layout.outer_specs(tiny_checkpoint.shape)}
        for layer in range(4):
            tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(layer)}
            pruned = prune_layer(tensors, kept[layer])
            yield from layer_shards(layer, narrow_experts(pruned, group[kept[layer]])[0] if layer == 1 else pruned)

    write_checkpoint(tmp_path / "child", layout.child_config(tiny_checkpoint.config, blocks), shards())
    child = Checkpoint.open(tmp_path / "child")
    assert child.config["model_type"] == "gpt_oss_puzzle"
    tokens = random_tokens()
    masked = stream(tiny_checkpoint, tokens, kept, blocks, {1: group})
    assert (masked - stream(tiny_checkpoint, tokens)).abs().max() > 0.1
    assert_near(stream(child, tokens), masked)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_masking_equals_slicing(tiny_checkpoint: Checkpoint, top_k: int | None):
    block = loading.load_block(tiny_checkpoint, 1)
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    sliced = layers.slice_block(block, [1, 4, 6])
    assert sliced.mlp.experts.gate_up_proj.shape[0] == sliced.mlp.router.weight.shape[0] == 3
    masked = layers.mix(block, states, [1, 4, 6], top_k)
    assert_near(layers.mix_sliced(block, states, [1, 4, 6], top_k), masked)
    sliced.mlp.router.top_k = top_k or sliced.mlp.router.top_k
    normed = sliced.post_attention_layernorm(states)
    assert_near(states + sliced.mlp(normed.unsqueeze(0))[0][0], masked)  # transformers' own layer
    assert block.mlp.experts.gate_up_proj.shape[0] == 8


def test_narrow_experts_equal_those_whose_other_channels_are_masked(tiny_checkpoint: Checkpoint):
    """Another choice for every expert, in any order; what the other channels add to the output is zero."""
    block = loading.load_block(tiny_checkpoint, 1)
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    channels = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(n))[:20] for n in range(8)])
    narrowed = layers.mix(block, states, channels=channels)
    sliced = layers.slice_block(block, range(8), channels)
    assert sliced.mlp.experts.gate_up_proj.shape == (8, 64, 40)
    assert sliced.mlp.experts.down_proj.shape == (8, 20, 64)
    normed = sliced.post_attention_layernorm(states)
    assert_near(states + sliced.mlp(normed.unsqueeze(0))[0][0], narrowed)  # transformers' own layer
    masked = torch.zeros_like(block.mlp.experts.down_proj)
    for expert, kept in enumerate(channels):
        masked[expert, kept] = block.mlp.experts.down_proj[expert, kept]
    assert (narrowed - layers.mix(block, states)).abs().max() > 0.1
    block.mlp.experts.down_proj.data = masked
    assert_near(layers.mix(block, states), narrowed)


def test_routing_keeps_the_outputs_the_layer_mixes(tiny_checkpoint: Checkpoint):
    block = loading.load_block(tiny_checkpoint, 2)
    states = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    routing = layers.route(block, states, num_spare=1)
    expected, _ = block.mlp(states.unsqueeze(0))
    assert_near(routing.mixture(), expected[0])
    assert routing.expert_ids.shape == (30, 3)
    third = routing.expert_ids[:, 2:]
    alone = block.mlp.experts(states, third, torch.ones(30, 1))
    assert_near(routing.outputs[:, 2], alone)


def test_bfloat16_blocks_stay_close(tiny_checkpoint: Checkpoint):
    tokens = random_tokens()
    block, rotary = loading.load_block(tiny_checkpoint, 1), loading.rotary(tiny_checkpoint, 40)
    half = loading.load_block(tiny_checkpoint, 1, torch.bfloat16)
    assert half.input_layernorm.weight.dtype == torch.float32
    (hidden,) = loading.embed(tiny_checkpoint, [tokens])
    expected = layers.attend(block, hidden, rotary, None)
    found = layers.attend(half, hidden.bfloat16(), loading.rotary(tiny_checkpoint, 40, torch.bfloat16), None)
    assert (found.float() - expected).norm() / expected.norm() < 0.02

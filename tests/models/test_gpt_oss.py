"""The gpt-oss family from shapes alone: nothing is allocated."""

import pytest

from moesaic.costs.block_costs import request_kv_bytes
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import (
    GPT_OSS,
    GPT_OSS_20B,
    GPT_OSS_20B_BLOCKS,
    GPT_OSS_120B,
    GPT_OSS_120B_BLOCKS,
    GPT_OSS_PUZZLE_88B_BLOCKS,
)
from moesaic.models.layout import num_bytes, num_parameters

GB = 1e9
GIB = 2**30


def test_sizes_of_the_parent_follow_the_hand_formula() -> None:
    expert = 2880 * 5760 + 5760 + 2880 * 2880 + 2880
    assert expert == 24_891_840
    router_row = 2880 + 1
    attention = 2 * (2880 * 4096) + 4096 + 2880 + 2 * (2880 * 512 + 512)
    layer = attention + 2 * 2880 + 64 + 128 * (expert + router_row)
    assert num_parameters(GPT_OSS_120B, GPT_OSS_120B_BLOCKS) == 36 * layer + 2 * 201_088 * 2880 + 2880


@pytest.mark.parametrize(
    ("shape", "blocks", "billions", "gib"),
    [
        (GPT_OSS_120B, GPT_OSS_120B_BLOCKS, 116.83, 60.77),
        (GPT_OSS_120B, GPT_OSS_PUZZLE_88B_BLOCKS, 88.15, 46.56),
        (GPT_OSS_20B, GPT_OSS_20B_BLOCKS, 20.91, 12.82),
    ],
)
def test_released_models(shape: ModelShape, blocks: Architecture, billions: float, gib: float) -> None:
    assert num_parameters(shape, blocks) / 1e9 == pytest.approx(billions, abs=0.005)
    assert num_bytes(shape, blocks) / GIB == pytest.approx(gib, abs=0.01)


def test_released_layout() -> None:
    blocks = GPT_OSS_PUZZLE_88B_BLOCKS
    assert blocks.num_experts == 3456
    assert GPT_OSS_120B_BLOCKS.num_experts == 4608
    assert blocks.layouts == {128: 18, None: 10, 8192: 8}
    assert [layer for layer, block in enumerate(blocks.blocks) if block.window is None] == [
        1, 7, 9, 11, 13, 15, 17, 19, 25, 29,
    ]  # fmt: skip
    blocks.check_child_of(GPT_OSS_120B_BLOCKS)


@pytest.mark.parametrize(
    ("tokens", "parent_gb", "child_gb"), [(8192, 0.153, 0.153), (32_768, 0.606, 0.405), (131_072, 2.418, 1.412)]
)
def test_kv_cache_of_one_sequence_in_fp8(tokens: int, parent_gb: float, child_gb: float) -> None:
    parent = request_kv_bytes(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, tokens, "fp8", "tensorrt_llm")
    child = request_kv_bytes(GPT_OSS_120B, GPT_OSS_PUZZLE_88B_BLOCKS, tokens, "fp8", "tensorrt_llm")
    assert parent / GB == pytest.approx(parent_gb, abs=0.0005)
    assert child / GB == pytest.approx(child_gb, abs=0.0005)


def test_packed_experts_take_four_and_a_quarter_bits() -> None:
    specs = layout.layer_specs(GPT_OSS_120B, 0, Block(1, 1, 2880))
    packed = [spec for name, spec in specs.items() if name.endswith(("_blocks", "_scales"))]
    weights = sum(spec.num_parameters for spec in packed)
    assert weights == 2880 * 5760 + 2880 * 2880
    assert sum(spec.num_bytes for spec in packed) * 8 / weights == 4.25


def test_unpacked_layers_have_the_same_parameters() -> None:
    packed = layout.layer_specs(GPT_OSS_120B, 3, Block(64, 4, 2880))
    unpacked = layout.layer_specs(GPT_OSS_120B, 3, Block(64, 4, 2880), packed=False)
    count = sum(spec.num_parameters for spec in packed.values())
    assert count == sum(spec.num_parameters for spec in unpacked.values())
    assert sum(spec.num_bytes for spec in unpacked.values()) == 2 * count


def test_trainable_groups_cover_everything_but_the_experts_once():
    shape = ModelShape(GPT_OSS, 64, 4, 2, 16, 64, 512)
    layers = Architecture.of([Block(4, 2, 32, None), Block(2, 1, 32, 8)])
    groups = ("attention", "norms", "router", "embedding", "head")
    parts = [layout.trainable_names(shape, layers, [group]) for group in groups]
    names = [name for part in parts for name in part]
    everything = [name for name in layout.tensor_specs(shape, layers) if ".mlp.experts." not in name]
    assert sorted(names) == sorted(everything)
    assert [len(part) for part in parts] == [2 * 9, 2 * 2 + 1, 2 * 2, 1, 1]

"""Costs against figures published for the released child, and against sums done by hand."""

from collections import Counter

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.costs.block_costs import (
    BlockCost,
    CostTable,
    FixedCost,
    Runtime,
    WorkloadCost,
    block_bytes,
    block_parameters,
    expected_experts,
    layer_kv_bytes,
    least_padding_group_size,
    mean_context,
    outer_bytes,
    outer_parameters,
    request_kv_bytes,
    stock_group_size,
)
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.models.gpt_oss import (
    GPT_OSS_120B,
    GPT_OSS_120B_BLOCKS,
    GPT_OSS_PUZZLE_88B_BLOCKS,
    num_bytes,
    num_parameters,
)

CONTEXT = 96 * 1024
NINE_NINE_EIGHTEEN = Architecture.of(
    Block(128, 128 if layer % 2 == 0 else 8192 if layer % 4 == 1 else None) for layer in range(36)
)


def _kv_ratio(child: Architecture, tokens: int, child_group: int | None) -> float:
    group = stock_group_size(GPT_OSS_120B_BLOCKS.layouts)
    parent = request_kv_bytes(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, tokens, "fp8", group)
    return request_kv_bytes(GPT_OSS_120B, child, tokens, "fp8", child_group) / parent


def test_kv_memory_of_the_release_under_each_allocator() -> None:
    layouts = GPT_OSS_PUZZLE_88B_BLOCKS.layouts
    assert stock_group_size(layouts) == 8
    assert least_padding_group_size(layouts) == 10
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, CONTEXT, None) == pytest.approx(0.593, abs=0.0005)
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, CONTEXT, 8) == pytest.approx(0.926, abs=0.0005)
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, CONTEXT, 10) == pytest.approx(0.603, abs=0.0006)
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, 6 * 1024, 8) == pytest.approx(1.333, abs=0.0005)


def test_a_layout_of_equal_groups_pads_nothing() -> None:
    assert NINE_NINE_EIGHTEEN.layouts == {128: 18, 8192: 9, None: 9}
    size = stock_group_size(NINE_NINE_EIGHTEEN.layouts)
    assert size == 9
    assert _kv_ratio(NINE_NINE_EIGHTEEN, CONTEXT, size) == _kv_ratio(NINE_NINE_EIGHTEEN, CONTEXT, None)
    assert _kv_ratio(NINE_NINE_EIGHTEEN, CONTEXT, size) == pytest.approx(0.542, abs=0.0005)


def test_stock_groups_pad_up_when_counts_are_nearly_equal() -> None:
    assert stock_group_size(Counter({None: 5, 128: 6})) == 6
    assert stock_group_size(Counter({None: 4, 128: 5})) == 4


def test_a_window_keeps_no_more_than_its_length() -> None:
    assert layer_kv_bytes(GPT_OSS_120B, None, 1000, "fp8") == 1000 * 1024
    assert layer_kv_bytes(GPT_OSS_120B, 128, 1000, "bf16") == 128 * 2048
    assert layer_kv_bytes(GPT_OSS_120B, 8192, 1000, "fp8") == 1000 * 1024


def test_block_sizes_add_up_to_the_model() -> None:
    blocks = GPT_OSS_PUZZLE_88B_BLOCKS.blocks
    parameters = outer_parameters(GPT_OSS_120B) + sum(block_parameters(GPT_OSS_120B, block) for block in blocks)
    memory = outer_bytes(GPT_OSS_120B) + sum(block_bytes(GPT_OSS_120B, block) for block in blocks)
    assert parameters == num_parameters(GPT_OSS_120B, GPT_OSS_PUZZLE_88B_BLOCKS)
    assert memory == num_bytes(GPT_OSS_120B, GPT_OSS_PUZZLE_88B_BLOCKS)


def test_halving_a_layers_experts_frees_850_megabytes() -> None:
    freed = block_bytes(GPT_OSS_120B, Block(128)) - block_bytes(GPT_OSS_120B, Block(64))
    assert freed / 1e9 == pytest.approx(0.85, abs=0.005)


def test_expected_experts() -> None:
    assert expected_experts(128, 4, 1) == pytest.approx(4)
    assert expected_experts(2, 1, 2) == pytest.approx(1.5)
    assert expected_experts(4, 4, 1) == 4
    assert expected_experts(128, 4, 10_000) == pytest.approx(128)


def _table() -> CostTable:
    """Two workloads; a block of n experts has n parameters, 10 n bytes and 2 ms a step, full attention 1 ms more."""
    workloads = (
        Workload(name="long", input_tokens=100, output_tokens=20, concurrency=3),
        Workload(name="short", input_tokens=4, output_tokens=4, concurrency=8),
    )

    def cost(block: Block) -> BlockCost:
        runtimes = {
            workload.name: WorkloadCost(
                prefill_ms=7.0, decode_ms=2.0 + (block.window is None), kv_bytes=block.window or 100
            )
            for workload in workloads
        }
        return BlockCost(block.num_experts, 10 * block.num_experts, "measured", runtimes)

    blocks = [Block(8, None), Block(8, 16), Block(4, None), Block(4, 16)]
    fixed = FixedCost(1000, 2000, {workload.name: Runtime(5.0, 0.5) for workload in workloads})
    parent = Architecture.of([Block(8, 16), Block(8, None)])
    return CostTable(parent, {"device": "cpu"}, "bf16", workloads, fixed, {block: cost(block) for block in blocks})


def test_an_assembly_is_the_sum_of_its_blocks() -> None:
    cost = _table().evaluate(Architecture.of([Block(4, 16), Block(8, None)]))
    assert cost.parameters == 1000 + 4 + 8
    assert cost.num_experts == 12
    assert cost.memory_mib["long"] * 2**20 == pytest.approx(2000 + 120 + 3 * (16 + 100))
    assert cost.latency_ms["long"] == pytest.approx(0.5 + 2 + 3)
    assert cost.throughput_tokens_per_s["long"] == pytest.approx(1000 * 3 * 20 / (5 + 14 + 20 * 5.5))
    assert cost.throughput_tokens_per_s["short"] == pytest.approx(1000 * 8 * 4 / (5 + 14 + 4 * 5.5))


def test_allocator_padding_is_an_option() -> None:
    architecture = Architecture.of([Block(8, 16), Block(8, 16), Block(8, 16), Block(8, None)])
    exact, padded = _table().evaluate(architecture), _table().evaluate(architecture, group_size=2)
    assert (padded.memory_mib["long"] - exact.memory_mib["long"]) * 2**20 == pytest.approx(3 * (16 + 100))


def test_the_table_survives_json() -> None:
    table = _table()
    assert CostTable.from_json(table.to_json()) == table
    assert table.to_json().endswith("}\n")


def test_a_damaged_table_is_refused() -> None:
    with pytest.raises(ArtifactError, match="run measure_costs again"):
        CostTable.from_json(_table().to_json().replace('"kv_cache"', '"cache"'))


def test_mean_context_is_halfway_through_the_output() -> None:
    assert mean_context(Workload(name="w", input_tokens=64, output_tokens=64, concurrency=1)) == 96

"""Costs against figures published for the released child, and against sums done by hand."""

from collections import Counter
from dataclasses import replace

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
    mean_context,
    outer_bytes,
    outer_parameters,
    request_kv_bytes,
)
from moesaic.costs.kv_allocator import TargetEngine, held_tokens, paid_layers
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
from moesaic.models.layout import num_bytes, num_parameters

CONTEXT = 96 * 1024
NINE_NINE_EIGHTEEN = Architecture.of(
    Block(128, 4, 2880, 128 if layer % 2 == 0 else 8192 if layer % 4 == 1 else None) for layer in range(36)
)


def _kv_ratio(child: Architecture, tokens: int, engine: TargetEngine) -> float:
    parent = request_kv_bytes(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, tokens, "fp8", engine)
    return request_kv_bytes(GPT_OSS_120B, child, tokens, "fp8", engine) / parent


def test_kv_memory_of_the_release_under_each_allocator() -> None:
    """10 full, 8 of 8192 and 18 of 128: groups of 8 make 16, 8 and 24 of them, groups of 10 make 10, 10 and 20."""
    layout = GPT_OSS_PUZZLE_88B_BLOCKS.layouts
    assert paid_layers("tensorrt_llm", layout) == layout
    assert paid_layers("vllm", layout) == {None: 16, 8192: 8, 128: 24}
    assert paid_layers("vllm_puzzle", layout) == {None: 10, 8192: 10, 128: 20}
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, CONTEXT, "tensorrt_llm") == pytest.approx(0.593, abs=0.0005)
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, CONTEXT, "vllm") == pytest.approx(0.927, abs=0.0005)
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, CONTEXT, "vllm_puzzle") == pytest.approx(0.603, abs=0.0006)
    assert _kv_ratio(GPT_OSS_PUZZLE_88B_BLOCKS, 6 * 1024, "vllm") == pytest.approx(1.3345, abs=0.0005)


def test_a_layout_of_equal_groups_pads_nothing() -> None:
    assert NINE_NINE_EIGHTEEN.layouts == {128: 18, 8192: 9, None: 9}
    assert paid_layers("vllm", NINE_NINE_EIGHTEEN.layouts) == NINE_NINE_EIGHTEEN.layouts
    assert _kv_ratio(NINE_NINE_EIGHTEEN, CONTEXT, "vllm") == pytest.approx(0.5426, abs=0.0005)


def test_stock_groups_pad_up_when_counts_are_nearly_equal() -> None:
    assert paid_layers("vllm", Counter({None: 5, 128: 6})) == {None: 6, 128: 6}
    assert paid_layers("vllm", Counter({None: 15, 128: 21})) == {None: 21, 128: 21}
    assert paid_layers("vllm", Counter({None: 14, 128: 21})) == {None: 14, 128: 28}, "1.5 times is too much"


def test_vllm_holds_blocks_and_the_tokens_of_two_steps() -> None:
    """Blocks of 16, one more per window: 127 + 2 tokens are 9 + 1 blocks, 127 + 2 * 8192 are 1032 + 1."""
    assert held_tokens("vllm", None, 100_001, 8192) == 100_016
    assert held_tokens("vllm", 128, 100_001) == 10 * 16
    assert held_tokens("vllm", 128, 100_001, 8192) == 1033 * 16
    assert held_tokens("vllm_puzzle", 8192, 100_001, 8192) == 1537 * 16, "8191 + 16384 are 1535.9 blocks"
    assert held_tokens("vllm", 8192, 4096, 8192) == 4096 + 16, "no more than there is, and a block"
    assert held_tokens("tensorrt_llm", 128, 100_001, 8192) == 128


def test_a_prompt_being_read_is_paid_for_once() -> None:
    """A window of 16 in one layer: of 3 requests each holds 17 tokens in 2 + 1 blocks, one holds 100 in 7 + 1."""
    shape, block = GPT_OSS_120B, Block(8, 2, 2880, 16)
    kept, reading = (layer_kv_bytes(shape, 16, 100, "bf16", "vllm", step) for step in (1, 8192))
    assert (kept, reading) == (48 * 2048, 128 * 2048)
    costs = WorkloadCost(0.0, 0.0, kept, reading - kept)
    table = replace(_table(), engine="vllm", blocks={block: BlockCost(8, 80, "modelled", {"long": costs})})
    assert table.cache_bytes(16, table.workloads[0]) == (2 * 48 + 128) * 2048


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


def test_halving_a_layers_experts_or_their_width_frees_850_megabytes() -> None:
    narrower = block_parameters(GPT_OSS_120B, Block(128, 4, 2880)) - block_parameters(GPT_OSS_120B, Block(128, 4, 1440))
    assert narrower == 128 * 1440 * (3 * 2880 + 2), "gate, up and down of a channel, and two biases"
    freed = block_bytes(GPT_OSS_120B, Block(128, 4, 2880)) - block_bytes(GPT_OSS_120B, Block(64, 4, 2880))
    assert freed / 1e9 == pytest.approx(0.85, abs=0.005)
    narrower = block_bytes(GPT_OSS_120B, Block(128, 4, 2880)) - block_bytes(GPT_OSS_120B, Block(128, 4, 1440))
    assert narrower / 1e9 == pytest.approx(0.85, abs=0.005)


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
        return BlockCost(block.num_experts, 10 * block.num_experts, "in_process", runtimes)

    blocks = [Block(8, 2, 2880, None), Block(8, 2, 2880, 16), Block(4, 2, 2880, None), Block(4, 2, 2880, 16)]
    fixed = FixedCost(1000, 2000, "in_process", {workload.name: Runtime(5.0, 0.5) for workload in workloads})
    parent = Architecture.of([Block(8, 2, 2880, 16), Block(8, 2, 2880, None)])
    return CostTable(
        parent, {"device": "cpu"}, "bf16", "moesaic", workloads, fixed, {block: cost(block) for block in blocks}
    )


def test_an_assembly_is_the_sum_of_its_blocks() -> None:
    cost = _table().evaluate(Architecture.of([Block(4, 2, 2880, 16), Block(8, 2, 2880, None)]))
    assert cost.parameters == 1000 + 4 + 8
    assert cost.num_experts == 12
    assert cost.memory_mib["long"] * 2**20 == pytest.approx(2000 + 120 + 3 * (16 + 100))
    assert cost.latency_ms["long"] == pytest.approx(0.5 + 2 + 3)
    assert cost.throughput_tokens_per_s["long"] == pytest.approx(1000 * 3 * 20 / (5 + 14 + 20 * 5.5))
    assert cost.throughput_tokens_per_s["short"] == pytest.approx(1000 * 8 * 4 / (5 + 14 + 4 * 5.5))


def test_memory_pays_for_the_engines_groups() -> None:
    """Three windows and two full layers are in groups of 2: one layer of 16 bytes more for each of 3 requests."""
    architecture = Architecture.of([*[Block(8, 2, 2880, 16)] * 3, *[Block(8, 2, 2880, None)] * 2])
    exact, padded = (replace(_table(), engine=engine).evaluate(architecture) for engine in ("moesaic", "vllm"))
    assert (padded.memory_mib["long"] - exact.memory_mib["long"]) * 2**20 == pytest.approx(3 * 16)


def test_the_table_survives_json() -> None:
    table = _table()
    assert CostTable.from_json(table.to_json()) == table
    assert table.to_json().endswith("}\n")


def test_a_damaged_table_is_refused() -> None:
    with pytest.raises(ArtifactError, match="run measure_costs again"):
        CostTable.from_json(_table().to_json().replace('"kv_cache"', '"cache"'))


def test_mean_context_is_halfway_through_the_output() -> None:
    assert mean_context(Workload(name="w", input_tokens=64, output_tokens=64, concurrency=1)) == 96

"""The hardware model: its fits at points a reader can check by hand, and that more work never takes less time."""

from pathlib import Path

import pytest

import moesaic
from moesaic.architecture import Architecture, Block
from moesaic.configs import MeasureCostsConfig, SearchSpace, Workload
from moesaic.costs import expected_experts
from moesaic.errors import ConfigError
from moesaic.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
from moesaic.hardware import HardwareTable, Target, model_blocks

H100 = HardwareTable.from_json((Path(moesaic.__file__).parent / "hardware_tables" / "h100.json").read_text())
ONE = Target(H100, GPT_OSS_120B, num_gpus=1, kv_cache="bf16")
EIGHT = Target(H100, GPT_OSS_120B, num_gpus=8, kv_cache="fp8")


def test_the_table_is_dated_and_named() -> None:
    assert H100.name == "h100"
    assert H100.date == "2026-11-22"


def test_moe_fit_on_one_gpu() -> None:
    """One token: 4 experts of 13.24 MB (24.89M parameters) at 2.82 TB/s after 41 us."""
    assert ONE.moe_ms(128, 1) == pytest.approx(0.041 + 4 * 13.242e6 / 2.82e9 + 8 * 24.8947e6 / 0.49e12, rel=1e-3)


def test_moe_fit_on_eight_gpus() -> None:
    touched = expected_experts(128, 4, 64)
    streamed = touched * 13.242e6 / 8 / 2.48e9
    assert EIGHT.moe_ms(128, 64) == pytest.approx(0.035 + streamed + 64 * 8 * 24.8947e6 / 8 / 0.32e12, rel=1e-3)


def test_decode_attention_fit() -> None:
    """16 requests at 64K: 16 x 65,536 x 2,048 bytes at 3.0 TB/s after 13 us; a window of 128 costs the floor."""
    assert ONE.cache_ms(Block(128), 16, 65_536) == pytest.approx(0.013 + 16 * 65_536 * 2048 / 3.0e9)
    assert ONE.cache_ms(Block(128, 128), 1, 65_536) == 0.016
    assert EIGHT.cache_ms(Block(128), 64, 65_536) == pytest.approx(0.013 + 8 * 65_536 * 1024 / 2.3e9)


def test_all_reduce_needs_more_than_one_gpu() -> None:
    assert ONE.all_reduce_ms(64) == 0
    assert EIGHT.all_reduce_ms(64) == pytest.approx(0.006 + 64 * 2880 * 2 / 190e6)


def test_prompt_attention_counts_visible_pairs() -> None:
    """Causal pairs of 4 tokens: 10; with a window of 2: 1 + 2 + 2 + 2."""
    per_pair = 4 * 64 * 64 / 0.4e12
    assert ONE.prompt_attention_ms(Block(128), 4) == pytest.approx(10 * per_pair)
    assert ONE.prompt_attention_ms(Block(128, 2), 4) == pytest.approx(7 * per_pair)


@pytest.mark.parametrize("target", [ONE, EIGHT])
def test_more_work_never_takes_less_time(target: Target) -> None:
    def runtimes(blocks: list[Block], workload: Workload) -> list[tuple[float, float]]:
        found = [target.block_runtime(block, workload) for block in blocks]
        return [(runtime.prefill_ms, runtime.decode_ms) for runtime in found]

    long = Workload(name="long", input_tokens=65_536, output_tokens=65_536, concurrency=16)
    experts = runtimes([Block(count) for count in (16, 32, 64, 96, 128)], long)
    windows = runtimes([Block(128, window) for window in (128, 8192, 32_768)] + [Block(128)], long)
    assert experts == sorted(experts)
    assert windows == sorted(windows)
    loads = [long.model_copy(update={"concurrency": count}) for count in (1, 4, 64)]
    steps = [target.block_runtime(Block(128), load).decode_ms for load in loads]
    assert steps == sorted(steps)


def _speedup(workload: Workload) -> float:
    config = MeasureCostsConfig(
        space=SearchSpace(expert_counts=(64,), windows=(8192,)),
        workloads=(workload,),
        source="model",
        num_gpus=8,
        kv_cache="fp8",
    )
    distinct = list({*GPT_OSS_120B_BLOCKS.blocks, *GPT_OSS_PUZZLE_88B_BLOCKS.blocks})
    runtimes, fixed = model_blocks(H100, GPT_OSS_120B, distinct, config)

    def busy_ms(architecture: Architecture) -> float:
        found = [runtimes[block][workload.name] for block in architecture.blocks] + [fixed[workload.name]]
        return sum(runtime.prefill_ms + workload.output_tokens * runtime.decode_ms for runtime in found)

    return busy_ms(GPT_OSS_120B_BLOCKS) / busy_ms(GPT_OSS_PUZZLE_88B_BLOCKS)


def test_the_released_child_gains_more_at_long_context() -> None:
    long = _speedup(Workload(name="long", input_tokens=65_536, output_tokens=65_536, concurrency=128))
    short = _speedup(Workload(name="short", input_tokens=4096, output_tokens=4096, concurrency=512))
    assert 1.3 < long < 1.8, "the paper measured 1.63 at each model's own best concurrency"
    assert 1.0 < short < 1.3, "the paper measured 1.22"
    assert short < long


def test_other_numbers_of_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fits for \[1, 8\] GPUs, got num_gpus=3"):
        H100.check_num_gpus(3)

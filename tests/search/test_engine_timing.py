"""Blocks timed in the serving engine itself; the stacks of layers they are timed in need no engine."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ConfigError
from moesaic.costs.block_costs import CostTable
from moesaic.costs.workload import Workload
from moesaic.deploy.engines.vllm.engine import TimedSteps
from moesaic.deploy.engines.vllm.environment import why_unsupported
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.pipelines import example
from moesaic.search.measure_costs import engine_timing
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.engine_timing import time_in_engine, write_stack
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.space import SearchSpace

LONG = Workload(name="long", input_tokens=512, output_tokens=64, concurrency=8)


def config(**changes: Any) -> MeasureCostsConfig:
    given = {"space": SearchSpace(expert_counts=(16, 8), windows=()), "workloads": (LONG,), "engine": "vllm"}
    return MeasureCostsConfig.model_validate(given | changes)


def measured(asked: MeasureCostsConfig, parent: Path, scratch: Path) -> CostTable:
    output = scratch / "output"
    output.mkdir()
    measure_costs.run(asked, parent=parent, output=output, scratch=scratch)
    return CostTable.from_json((output / "costs.json").read_text())


def test_a_stack_has_the_parents_layers_again_and_again(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_stack(tiny_checkpoint, [Block(4, 2, 64, 16)] * 6, tmp_path / "stack")
    stack = Checkpoint.open(tmp_path / "stack")
    assert stack.architecture == Architecture.of([Block(4, 2, 64, 16)] * 6)
    for name in ("mlp.router.weight", "self_attn.q_proj.weight"):
        for layer in (1, 5):
            own, parents = (f"model.layers.{number}.{name}" for number in (layer, layer % 4))
            expected = tiny_checkpoint.tensor(parents)
            assert stack.tensor(own).equal(expected[:4] if "router" in name else expected)


def test_a_stack_of_narrower_experts_keeps_the_first_channels(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_stack(tiny_checkpoint, [Block(4, 2, 32, 16)] * 2, tmp_path / "stack")
    stack, name = Checkpoint.open(tmp_path / "stack"), "model.layers.1.mlp.experts.gate_up_proj_blocks"
    assert stack.architecture == Architecture.of([Block(4, 2, 32, 16)] * 2)
    assert stack.tensor(name).equal(tiny_checkpoint.tensor(name)[:4, :64])


def test_a_machine_that_slows_down_steadily_slows_all_blocks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four equal blocks, an engine that takes 10 % longer at every start: 1 ms a layer, then 1.1, up to 1.7."""
    starts = count()

    def slower_each_time(*_: object) -> TimedSteps:
        slowness = 1 + 0.1 * next(starts)
        return TimedSteps("an engine", [[[(100 + layers) * slowness] * 3] * 2 for layers in (4, 8)])

    monkeypatch.setattr(engine_timing, "time_stacks", slower_each_time)
    distinct = [Block(experts, 2, 64, None) for experts in (16, 12, 8, 4)]
    times = time_in_engine(Checkpoint.open(example() / "parent"), distinct, config(), Path())
    assert [each["long"].decode_ms for each in times.blocks.values()] == pytest.approx([1.35] * 4)
    assert times.fixed["long"].decode_ms == pytest.approx(135)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tensorrt_llm"}, "timed in engine 'vllm' or 'moesaic', not 'tensorrt_llm'"),
        (
            {"num_gpus": 2, "expert_parallel": True, "space": SearchSpace(expert_counts=(15,))},
            "do not divide the 15 experts of 15e",
        ),
    ],
)
def test_what_cannot_be_timed_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(config(**changes), example() / "parent", tmp_path)


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(why_unsupported()), reason=f"no vLLM here: {why_unsupported()}")
@pytest.mark.parametrize(
    "cache",
    [
        "bf16",
        pytest.param("fp8", marks=pytest.mark.skipif(bool(why_unsupported(fp8_cache=True)), reason="no FP8 cache")),
    ],
)
def test_costs_of_the_engines_own_layers(cache: str, tmp_path: Path) -> None:
    """One table of repeated timings; how far they scatter is part of it."""
    window = SearchSpace(expert_counts=(16,), windows=())
    table = measured(config(kv_cache=cache, space=window, repeats=5), example() / "parent", tmp_path)
    assert table.hardware["device"].startswith("vLLM 0.3")
    assert table.hardware["relative_spread"] < 0.25
    assert {cost.source for cost in (*table.blocks.values(), table.fixed)} == {"vllm"}
    runtimes = [*(cost.workloads["long"] for cost in table.blocks.values()), table.fixed.workloads["long"]]
    assert all(runtime.prefill_ms > 0 and runtime.decode_ms > 0 for runtime in runtimes)
    short, full = (table.blocks[Block(16, 2, 64, window)].workloads["long"] for window in (32, None))
    assert full.kv_bytes > short.kv_bytes
    assert table.evaluate(table.parent).throughput_tokens_per_s["long"] > 0

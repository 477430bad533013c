"""Measured and modelled costs of the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.architecture import Architecture, Block
from moesaic.checkpoint import Checkpoint
from moesaic.configs import MeasureCostsConfig, SearchSpace, Workload
from moesaic.costs import CostTable
from moesaic.errors import ConfigError, StageError
from moesaic.gpt_oss import num_bytes, num_parameters
from moesaic.stages import measure_costs
from moesaic.stages.block_timing import Bench, Job, layer_to_time, time_jobs

SPACE = SearchSpace(expert_counts=(8, 4), windows=(16,))
LONG = Workload(name="long", input_tokens=256, output_tokens=32, concurrency=4)
SHORT = Workload(name="short", input_tokens=8, output_tokens=8, concurrency=2)


def _config(**changes: Any) -> MeasureCostsConfig:
    return MeasureCostsConfig.model_validate({"space": SPACE, "workloads": (LONG, SHORT), "repeats": 1} | changes)


def _run(config: MeasureCostsConfig, parent: Path, tmp_path: Path) -> CostTable:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir(), scratch.mkdir()
    measure_costs.run(config, parent=parent, output=output, scratch=scratch)
    return CostTable.from_json((output / "costs.json").read_text())


def test_measured_costs(tiny_parent: Path, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    table = _run(_config(), tiny_parent, tmp_path)
    assert set(table.blocks) == {Block(count, window) for count in (8, 4) for window in (None, 16, 8)}
    assert {cost.source for cost in table.blocks.values()} == {"measured"}
    assert table.hardware["device"] in ("cpu", "cuda")
    runtimes = [cost.workloads[name] for cost in table.blocks.values() for name in ("long", "short")]
    assert all(0 < runtime.decode_ms < 1000 and 0 < runtime.prefill_ms < 1000 for runtime in runtimes)
    parent = table.evaluate(tiny_checkpoint.architecture)
    assert parent.parameters == num_parameters(tiny_checkpoint.shape, tiny_checkpoint.architecture)
    weights = num_bytes(tiny_checkpoint.shape, tiny_checkpoint.architecture)
    kv_bytes = 2 * (288 + 8) * 2 * 2 * 16 * 2
    assert parent.memory_mib["long"] * 2**20 == pytest.approx(weights + LONG.concurrency * kv_bytes)


def test_modelled_costs(tiny_parent: Path, tmp_path: Path) -> None:
    table = _run(_config(source="model", num_gpus=8, kv_cache="fp8"), tiny_parent, tmp_path)
    assert {cost.source for cost in table.blocks.values()} == {"modelled"}
    assert table.hardware == {"device": "h100", "date": "2026-11-22", "num_gpus": 8}
    assert table.blocks[Block(8)].workloads["long"].kv_bytes == 288 * 64


def test_the_payload_is_the_contract(tiny_parent: Path, tmp_path: Path) -> None:
    _run(_config(source="model", workloads=(SHORT,)), tiny_parent, tmp_path)
    content = json.loads((tmp_path / "output" / "costs.json").read_text())
    assert set(content) == {"parent", "hardware", "kv_cache", "workloads", "fixed", "rows"}
    assert set(content["fixed"]) == {"parameters", "memory_bytes", "workloads"}
    row = content["rows"][0]
    assert set(row) == {"num_experts", "window", "parameters", "memory_bytes", "source", "workloads"}
    assert set(row["workloads"]["short"]) == {"kv_bytes", "prefill_ms", "decode_ms"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 2}, "times one device"),
        ({"source": "model", "num_gpus": 2}, r"fits for \[1, 8\]"),
        ({"source": "model", "hardware": "abacus"}, "no hardware table 'abacus'; choose one of h100"),
        ({"workloads": (LONG, LONG)}, "two workloads have the same name"),
        ({"workloads": (LONG.model_copy(update={"input_tokens": 500}),)}, "needs 532 positions, the model has 512"),
        ({"space": SearchSpace(expert_counts=(1,))}, "expert count 1 is below the 2"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, Any], message: str, tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(_config(**changes), tiny_parent, tmp_path)


def test_the_timed_layer_has_all_experts() -> None:
    assert layer_to_time(Architecture.of([Block(8)] * 4)) == 2
    assert layer_to_time(Architecture.of([Block(8), Block(8), Block(4), Block(6)])) == 1


def test_caches_are_filled_to_the_context(tiny_checkpoint: Checkpoint) -> None:
    bench = Bench.of(tiny_checkpoint, (LONG,), torch.float32, torch.device("cpu"))
    full, window = bench.cache(None, 4, 100), bench.cache(8, 4, 100)
    assert full.keys.shape == (4, 2, 100, 16)
    assert window.keys.shape == (4, 2, 7, 16)
    new = torch.zeros(4, 2, 1, 16)
    assert full.update(new, new)[0].shape[2] == 101
    assert window.update(new, new)[0].shape[2] == 8
    assert full.get_seq_length() == window.get_seq_length() == 101


def _loop(rounds: int) -> None:
    total = 0
    for value in range(rounds):
        total += value


def test_paired_timing_finds_the_time_of_one_call() -> None:
    jobs = [
        Job((None, "w", "prefill"), lambda: lambda: _loop(20_000)),
        Job((None, "w", "decode"), lambda: lambda: _loop(80_000)),
        Job((None, "scaled", "decode"), lambda: lambda: _loop(20_000), scale=10),
    ]
    times = time_jobs(jobs, 5, torch.device("cpu"))
    single = times[None, "w", "prefill"]
    assert times[None, "w", "decode"] / single == pytest.approx(4, rel=0.5)
    assert times[None, "scaled", "decode"] / single == pytest.approx(10, rel=0.5)


def test_timings_without_a_signal_are_an_error() -> None:
    """After the warm-up every pair is slow for N calls and fast for 2N, whichever comes first in its round."""
    slow = iter([False, *(False, True), *(False, True), *(True, False), *(False, True)])

    def prepare() -> Any:
        work = 20_000 if next(slow) else 10
        return lambda: _loop(work)

    with pytest.raises(StageError, match=r"decode of 4e/full under w took -.* too noisy; raise repeats"):
        time_jobs([Job((Block(4), "w", "decode"), prepare)], 1, torch.device("cpu"))

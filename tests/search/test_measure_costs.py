"""Measured and modelled costs of the tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from moesaic.core.errors import ConfigError, StageError
from moesaic.costs.block_costs import CostTable
from moesaic.costs.workload import Workload
from moesaic.models import loading
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layout import num_bytes, num_parameters
from moesaic.search.measure_costs import block_timing
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.block_timing import Bench, Job, _sized, layer_to_time, time_jobs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.space import SearchSpace

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = SearchSpace(expert_counts=(8, 4), windows=(16,))
LONG = Workload(name="long", input_tokens=256, output_tokens=32, concurrency=4)
SHORT = Workload(name="short", input_tokens=8, output_tokens=8, concurrency=2)


class Clock:
    """Milliseconds that pass by work alone, so that no result depends on the machine."""

    now_ms = 0.0
    look_ms = 0.0

    def __call__(self) -> float:
        self.now_ms += self.look_ms
        return self.now_ms

    def work(self, ms: float) -> None:
        self.now_ms += ms


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Takes the place of the machine's; every call of a torch module works for a millisecond."""
    clock = Clock()
    monkeypatch.setattr(block_timing, "_clock", lambda device: clock)
    handle = register_module_forward_hook(lambda *_: clock.work(1))
    yield clock
    handle.remove()


def _config(**changes: Any) -> MeasureCostsConfig:
    return MeasureCostsConfig.model_validate({"space": SPACE, "workloads": (LONG, SHORT), "repeats": 1} | changes)


def _run(config: MeasureCostsConfig, parent: Path, tmp_path: Path) -> CostTable:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir(), scratch.mkdir()
    measure_costs.run(config, parent=parent, output=output, scratch=scratch)
    return CostTable.from_json((output / "costs.json").read_text())


def test_measured_costs(tiny_parent: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, clock: Clock) -> None:
    table = _run(_config(), tiny_parent, tmp_path)
    assert set(table.blocks) == {Block(count, 2, 64, window) for count in (8, 4) for window in (None, 16, 8)}
    assert {cost.source for cost in table.blocks.values()} == {"in_process"}
    assert table.hardware["device"] in ("cpu", "cuda")
    runtimes = [cost.workloads[name] for cost in table.blocks.values() for name in ("long", "short")]
    assert all(runtime.decode_ms >= 1 and runtime.prefill_ms >= 1 for runtime in runtimes)
    parent = table.evaluate(tiny_checkpoint.architecture)
    assert parent.parameters == num_parameters(tiny_checkpoint.shape, tiny_checkpoint.architecture)
    weights = num_bytes(tiny_checkpoint.shape, tiny_checkpoint.architecture)
    kv_bytes = 2 * (288 + 8) * 2 * 2 * 16 * 2
    assert parent.memory_mib["long"] * 2**20 == pytest.approx(weights + LONG.concurrency * kv_bytes)


def test_modelled_costs(tiny_parent: Path, tmp_path: Path) -> None:
    table = _run(_config(source="model", num_gpus=8, kv_cache="fp8"), tiny_parent, tmp_path)
    assert {cost.source for cost in table.blocks.values()} == {"modelled"}
    assert table.hardware == {"device": "h100", "date": "2026-11-22", "num_gpus": 8, "expert_parallel": False}
    assert table.blocks[Block(8, 2, 64)].workloads["long"].kv_bytes == 288 * 64


def test_costs_for_vllm_pay_for_blocks_and_for_a_prompt_being_read(tiny_parent: Path, tmp_path: Path) -> None:
    """A window of 8: 7 + 2 tokens in 1 + 1 blocks of 16; a prompt of 256 that is read in one step has 16 + 1."""
    table = _run(_config(source="model", num_gpus=8, kv_cache="fp8", engine="vllm"), tiny_parent, tmp_path)
    full, window = (table.blocks[Block(8, 2, 64, window)].workloads["long"] for window in (None, 8))
    assert (full.kv_bytes, full.prompt_kv_bytes) == (288 * 64, 0)
    assert (window.kv_bytes, window.prompt_kv_bytes) == (2 * 16 * 64, (17 - 2) * 16 * 64)


def test_narrower_blocks_are_timed_in_their_own_size(tiny_parent: Path, tmp_path: Path, clock: Clock) -> None:
    space = SearchSpace(expert_counts=(4,), expert_widths=(32,))
    table = _run(_config(space=space), tiny_parent, tmp_path)
    sizes = {(block.num_experts, block.expert_width): block for block in table.blocks}
    assert set(sizes) == {(8, 64), (8, 32), (4, 64), (4, 32)}
    bytes_of = {size: table.blocks[block].memory_bytes for size, block in sizes.items()}
    assert bytes_of[8, 64] - bytes_of[8, 32] == 8 * (32 * 3 * 64 * 17 // 32 + 2 * 64)
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    with pytest.raises(ConfigError, match="expert width 40 cannot be stored in MXFP4"):
        _run(_config(space=SearchSpace(expert_counts=(4,), expert_widths=(40,))), tiny_parent, uneven)


def test_a_timed_layer_is_of_the_asked_size(tiny_checkpoint: Checkpoint) -> None:
    """Narrower than the layer, or wider: another layer of the parent may be."""
    whole = loading.load_block(tiny_checkpoint, 0)
    for width in (32, 64, 96):
        experts = _sized(whole, 4, width).mlp.experts
        assert tuple(experts.down_proj.shape) == (4, width, 64)
        assert torch.equal(experts.down_proj[3, width - 1], whole.mlp.experts.down_proj[3, (width - 1) % 64])


def test_the_payload_is_the_contract(tiny_parent: Path, tmp_path: Path) -> None:
    _run(_config(source="model", workloads=(SHORT,)), tiny_parent, tmp_path)
    content = json.loads((tmp_path / "output" / "costs.json").read_text())
    assert set(content) == {"parent", "hardware", "kv_cache", "engine", "workloads", "fixed", "rows"}
    assert set(content["fixed"]) == {"parameters", "memory_bytes", "source", "workloads"}
    row = content["rows"][0]
    assert set(row) == {
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "sliding_window",
        "parameters",
        "memory_bytes",
        "source",
        "workloads",
    }
    assert set(row["workloads"]["short"]) == {"kv_bytes", "prompt_kv_bytes", "prefill_ms", "decode_ms"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 2}, "times one device"),
        ({"source": "model", "num_gpus": 2}, r"parallelism for \[1, 8\]"),
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
    assert layer_to_time(Architecture.of([Block(8, 2, 64)] * 4)) == 2
    assert layer_to_time(Architecture.of([Block(8, 2, 64), Block(8, 2, 64), Block(4, 2, 64), Block(6, 2, 64)])) == 1


def test_caches_are_filled_to_the_context(tiny_checkpoint: Checkpoint) -> None:
    bench = Bench.of(tiny_checkpoint, (LONG,), torch.float32, torch.device("cpu"))
    full, window = bench.cache(None, 4, 100), bench.cache(8, 4, 100)
    assert full.keys.shape == (4, 2, 100, 16)
    assert window.keys.shape == (4, 2, 7, 16)
    new = torch.zeros(4, 2, 1, 16)
    assert full.update(new, new)[0].shape[2] == 101
    assert window.update(new, new)[0].shape[2] == 8
    assert full.get_seq_length() == window.get_seq_length() == 101


def test_paired_timing_finds_the_time_of_one_call(clock: Clock) -> None:
    """Looking at the clock takes 7 ms, which cancels."""
    clock.look_ms = 7
    jobs = [
        Job((None, "w", "prefill"), lambda: lambda: clock.work(2)),
        Job((None, "w", "decode"), lambda: lambda: clock.work(8)),
        Job((None, "scaled", "decode"), lambda: lambda: clock.work(2), scale=10),
    ]
    assert list(time_jobs(jobs, 5, torch.device("cpu")).values()) == [2, 8, 20]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_clock_of_the_cpu_goes_on_while_it_works(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    now_ms = block_timing._clock(torch.device("cpu"))
    start = now_ms()
    sum(range(100_000))
    assert now_ms() > start
    torch.set_num_threads(before)


def test_timings_without_a_signal_are_an_error(clock: Clock) -> None:
    """After the warm-up every pair is slow for N calls and fast for 2N, whichever comes first in its round."""
    slow = iter([False, *(False, True), *(False, True), *(True, False), *(False, True)])

    def prepare() -> Any:
        work_ms = 20 if next(slow) else 0.01
        return lambda: clock.work(work_ms)

    with pytest.raises(StageError, match=r"decode of 4e/top-2/64w/full under w took -.* too noisy; raise repeats"):
        time_jobs([Job((Block(4, 2, 64), "w", "decode"), prepare)], 1, torch.device("cpu"))

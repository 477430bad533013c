"""The benchmark's schedule and its arithmetic; times themselves depend on the machine."""

import json
from pathlib import Path

import pytest

from moesaic.core.errors import ConfigError
from moesaic.costs.workload import Workload
from moesaic.measure.benchmark import run as benchmark
from moesaic.measure.benchmark.run import Point, Timing, describe, list_points
from moesaic.measure.benchmark.stage import BenchmarkConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = BenchmarkConfig(
    batch_sizes=(1, 2),
    input_tokens=(5, 9),
    output_tokens=3,
    workloads=(
        Workload(name="long", input_tokens=9, output_tokens=4, concurrency=2),
        Workload(name="same", input_tokens=5, output_tokens=3, concurrency=1),
    ),
    repeats=2,
)


def test_points_are_the_sweep_and_the_workloads_each_once() -> None:
    assert list_points(CONFIG) == [Point(1, 5, 3), Point(2, 5, 3), Point(1, 9, 3), Point(2, 9, 3), Point(2, 9, 4)]


def test_throughput_counts_all_requests_over_the_whole_time() -> None:
    """2 requests of 3 tokens in 10, 20 and 40 ms: 600, 300 and 150 tokens per second."""
    timings = [Timing(4, 3, 10), Timing(8, 6, 20), Timing(16, 12, 40)]
    entry = describe("child", Point(2, 5, 3), timings)
    assert entry["tokens_per_s"] == {"median": 300, "min": 150, "max": 600}
    assert entry["prefill_ms"] == {"median": 8, "min": 4, "max": 16}
    assert entry["decode_ms"] == {"median": 6, "min": 3, "max": 12}


def test_both_models_take_turns_on_every_point(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[int, Point, int]] = []
    timed = benchmark.time_generation

    def record(model: object, point: Point, seed: int) -> Timing:
        turns.append((id(model), point, seed))
        return timed(model, point, seed)

    monkeypatch.setattr(benchmark, "time_generation", record)
    metrics = benchmark.run(CONFIG, parent=tiny_parent, child=tiny_parent, output=tmp_path, scratch=tmp_path)
    parent, child = turns[0][0], turns[1][0]
    expected = [
        (model, point, seed) for point in list_points(CONFIG) for seed in (0, 1, 2) for model in (parent, child)
    ]
    assert turns == expected
    points = json.loads((tmp_path / "measurements.json").read_text())["points"]
    assert [point["model"] for point in points] == ["parent", "child"] * 5
    assert all(0 < p["tokens_per_s"]["min"] <= p["tokens_per_s"]["median"] <= p["tokens_per_s"]["max"] for p in points)
    assert all(p["prefill_ms"]["median"] > 0 and p["decode_ms"]["median"] > 0 for p in points)
    assert metrics["speedup_in9_out4_batch2"] == pytest.approx(
        metrics["child_tokens_per_s_in9_out4_batch2"] / metrics["parent_tokens_per_s_in9_out4_batch2"]
    )


def test_contexts_beyond_the_models_positions_are_refused_first(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="510 input and 3 output tokens do not fit the 512 positions"):
        config = CONFIG.model_copy(update={"input_tokens": (510,)})
        benchmark.run(config, parent=tiny_parent, child=tiny_parent, output=tmp_path, scratch=tmp_path)
    assert not list(tmp_path.iterdir())


def test_by_block_a_model_is_the_sum_of_its_parts(tiny_parent: Path, tmp_path: Path) -> None:
    """The same model twice: whatever its blocks take, both take the same, and total = prefill + (new - 1) decode."""
    config = CONFIG.model_copy(update={"by_block": True, "workloads": (), "repeats": 6})
    metrics = benchmark.run(config, parent=tiny_parent, child=tiny_parent, output=tmp_path, scratch=tmp_path)
    content = json.loads((tmp_path / "measurements.json").read_text())
    assert content["hardware"]["by_block"] is True
    assert len(content["points"]) == 2 * 4
    for point in content["points"]:
        total_ms = point["prefill_ms"]["median"] + 2 * point["decode_ms"]["median"]
        assert point["tokens_per_s"]["median"] == pytest.approx(1000 * point["batch_size"] * 3 / total_ms)
    speedups = [value for name, value in metrics.items() if name.startswith("speedup")]
    assert speedups == [1.0] * 4

"""The stage with its real server and its real client; AIPerf's environment is made on the first run (minutes)."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ConfigError, StageError
from moesaic.deploy.engines import Server, ServerSpec
from moesaic.deploy.server.process import load
from moesaic.measure.benchmark_serving import run as benchmark_serving
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig, SweptWorkload
from moesaic.models.architecture import Architecture, Block
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig
from tests.deploy.test_server import LIMITS, Running
from tests.measure.aiperf_export import export

TINY = SweptWorkload(name="tiny", input_tokens=24, output_tokens=24, concurrencies=(2,))
CONFIG = BenchmarkServingConfig(
    workloads=(TINY,), requests_per_user=3, repeats=2, more_repeats=0, child_kv_cache="fp8_unit"
)
BLOCKS = Architecture.of([Block(8, 2, 64, 8), Block(5, 1, 64, 16), Block(2, 2, 64, 8), Block(8, 1, 64)]).blocks


@pytest.fixture(scope="module")
def child(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent, pruned."""
    directory = tmp_path_factory.mktemp("pruned")
    paths = {name: directory / name for name in ("ranking", "architecture", "output", "scratch")}
    for path in paths.values():
        path.mkdir()
    candidates = {"puzzle": {"blocks": [block.as_config() for block in BLOCKS]}}
    (paths["ranking"] / "ranking.json").write_text(json.dumps({"layers": [{"order": list(range(8))}] * 4}))
    (paths["architecture"] / "architecture.json").write_text(json.dumps({"candidates": candidates}))
    prune_model.run(PruneModelConfig(), parent=tiny_parent, **paths)
    return paths["output"]


def run(config: BenchmarkServingConfig, parent: Path, child: Path, directory: Path) -> dict[str, float]:
    for name in ("output", "scratch"):
        (directory / name).mkdir(exist_ok=True)
    return benchmark_serving.run(
        config, parent=parent, child=child, output=directory / "output", scratch=directory / "scratch"
    )


@pytest.mark.engine
@pytest.mark.timeout(3600)
def test_a_tiny_sweep_through_the_real_server_and_client(
    tiny_parent: Path, child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two users are measured; one user's runs are then half as fast as theirs, which takes no client and no server."""
    metrics = run(CONFIG, tiny_parent, child, tmp_path)
    payload = tmp_path / "output" / "measurements.json"
    found = json.loads(payload.read_text())
    assert found["counted_by_server"] == ["input_tokens", "output_tokens", "requests"]
    assert found["kv_cache"] == {"parent": "bf16", "child": "fp8_unit"}
    assert [(entry["model"], entry["concurrency"]) for entry in found["points"]] == [("parent", 2), ("child", 2)]
    for entry in found["points"]:
        check_figures(entry)
    ratio = found["ratios"][0]["tokens_per_s"]
    assert metrics["speedup_tiny_c2"] == ratio["median"] == pytest.approx((ratio["min"] + ratio["max"]) / 2)

    def refuse(*_: object) -> None:
        raise AssertionError("everything was measured already")

    monkeypatch.setattr(benchmark_serving, "started_server", refuse)
    before = payload.read_bytes()
    payload.unlink()
    run(CONFIG, tiny_parent, child, tmp_path)
    assert payload.read_bytes() == before
    for of_two in (tmp_path / "scratch").glob("*-tiny-2.json"):
        measured = json.loads(of_two.read_text())
        for figure in ("tokens_per_s", "requests_per_s"):
            measured["run"][figure] /= 2
        of_two.with_name(of_two.name.replace("-2.json", "-1.json")).write_text(json.dumps(measured))
    both = TINY.model_copy(update={"concurrencies": (1, 2)})
    run(CONFIG.model_copy(update={"workloads": (both,)}), tiny_parent, child, tmp_path)
    check_sweep(json.loads(payload.read_text()))


def check_sweep(found: dict[str, Any]) -> None:
    """Of both models at one user and at two, in this order."""
    places = [(entry["model"], entry["concurrency"]) for entry in found["points"]]
    assert places == [("parent", 1), ("parent", 2), ("child", 1), ("child", 2)]
    for best, sweep in zip(found["best"], (found["points"][:2], found["points"][2:]), strict=True):
        assert best["concurrency"] == 2
        assert best["tokens_per_s"] == max(entry["tokens_per_s"]["median"] for entry in sweep)
        assert best["requests_per_s"] == pytest.approx(best["tokens_per_s"] / TINY.output_tokens)
    assert all(set(front["concurrencies"]) <= {1, 2} for front in found["pareto"])
    assert [(half["concurrency"], half["ratio"] > 0) for half in found["parent_twice"]] == [(1, True), (2, True)]


def check_figures(entry: dict[str, Any]) -> None:
    """What must be so of any machine."""
    for figure in ("tokens_per_s", "requests_per_s", "tokens_per_s_per_user"):
        assert 0 < entry[figure]["min"] <= entry[figure]["median"] <= entry[figure]["max"]
    assert entry["requests_per_s"]["max"] == pytest.approx(entry["tokens_per_s"]["max"] / TINY.output_tokens)
    assert entry["ttft_ms"]["avg"]["min"] < entry["request_ms"]["avg"]["min"]
    assert entry["request_ms"]["p50"]["min"] <= entry["request_ms"]["p99"]["max"]
    assert entry["itl_ms"]["avg"]["median"] > 0


def pretend(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing and reports all the same."""
    path = directory / "aiperf"
    said = json.dumps(export()).replace("null", "None").replace("false", "False").replace("true", "True")
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "if '--version' in sys.argv: raise SystemExit(print('0'))\n"
        "settings = json.load(open(sys.argv[sys.argv.index('--config') + 1]))\n"
        "target = settings['benchmark']['artifacts']['dir']\n"
        f"json.dump({said}, open(target + '/profile_export_aiperf.json', 'w'))\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("MOESAIC_AIPERF", str(path))


@contextmanager
def server_in_a_thread(engine: str, spec: ServerSpec, log: Path, timeout_s: float) -> Iterator[Server]:
    """Our server, which really counts, without the process that the sweep above starts."""
    running = Running(load(spec.directory, spec.role, "bf16", "float32", LIMITS))
    try:
        yield Server(running.url, spec.role, None, log, engine)
    finally:
        running.stop()


def test_a_client_that_counts_what_the_server_does_not_is_caught(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch)
    monkeypatch.setattr(benchmark_serving, "started_server", server_in_a_thread)
    workload = SweptWorkload(name="claimed", input_tokens=32, output_tokens=8, concurrencies=(2,))
    config = CONFIG.model_copy(update={"workloads": (workload,)})
    with pytest.raises(StageError, match=r"parent does not hold: .*the server counted 0 requests, the client 8"):
        run(config, tiny_parent, tiny_parent, tmp_path)
    assert not list((tmp_path / "output").iterdir())
    assert not list((tmp_path / "scratch").glob("*.json"))


def test_a_server_that_dies_is_explained_by_its_own_words(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch)
    config = CONFIG.model_copy(update={"parent_kv_cache": "fp8"})
    with pytest.raises(StageError, match=r"ended with status 2 before it served(.|\n)*scale"):
        run(config, tiny_parent, tiny_parent, tmp_path)


def test_requests_beyond_the_models_positions_are_refused_first(tiny_parent: Path, tmp_path: Path) -> None:
    workload = SweptWorkload(name="endless", input_tokens=510, output_tokens=3)
    with pytest.raises(ConfigError, match="of workload 'endless' do not fit the 512 positions"):
        run(CONFIG.model_copy(update={"workloads": (workload,)}), tiny_parent, tiny_parent, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"repeats": 1}, "greater than or equal to 2"),
        ({"workloads": []}, "at least 1 item"),
        ({"workloads": [TINY.model_dump(), TINY.model_dump()]}, "each needs its own"),
        ({"workloads": [TINY.model_dump() | {"concurrencies": [2, 2]}]}, "names a concurrency twice"),
        ({"workloads": [TINY.model_dump() | {"output_tokens": 1}]}, "greater than or equal to 2"),
        ({"workloads": [TINY.model_dump() | {"name": "a/b"}]}, "should match pattern"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BenchmarkServingConfig.parse(json.dumps(changed))

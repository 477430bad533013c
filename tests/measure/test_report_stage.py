"""From the stages' directories to the page; the search and the cost table are the real ones."""

import json
from pathlib import Path

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.costs.workload import Workload
from moesaic.measure.report import run as report
from moesaic.measure.report.stage import ReportConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.library import variants_of
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.search_architecture import run as search_architecture
from moesaic.search.search_architecture.stage import SearchArchitectureConfig
from moesaic.search.space import SearchSpace
from tests.measure.recovery_inputs import BASELINE, recovery
from tests.measure.report_inputs import evaluation, point
from tests.measure.serving_inputs import serving

SPACE = SearchSpace(expert_counts=(8, 4, 2), windows=(64, 8))
LONG = Workload(name="long", input_tokens=256, output_tokens=64, concurrency=4)
NAMES = {
    "frontier",
    "efforts",
    "architecture",
    "importance",
    "damage",
    "search",
    "refinement",
    "throughput",
    "predictions",
}


def write(directory: Path, name: str, content: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture
def stages(tiny_parent: Path, tiny_checkpoint: Checkpoint, tmp_path: Path) -> dict[str, Path | list[Path]]:
    """The report's inputs as the pipeline hands them over."""
    blocks = tiny_checkpoint.architecture.blocks
    rows = []
    for layer, whole in enumerate(blocks):
        for block in variants_of(whole, SPACE):
            damage = (layer + 1) * (0.01 * (8 - block.num_experts) + 0.02 * (block.window != whole.window))
            metric = {"hidden_mse": damage / 2}
            rows.append({"layer": layer, **block.as_config(), "damage": damage} | {"short": metric, "long": metric})
    content = {"metric": "hidden_mse", "parent": [block.as_config() for block in blocks], "rows": rows}
    scores = write(tmp_path / "scores", "scores.json", content)
    order = {"order": list(range(8))}
    ranking = write(tmp_path / "ranking", "ranking.json", {"criterion": "reap", "layers": [order] * len(blocks)})
    costs, architecture = tmp_path / "costs", tmp_path / "architecture"
    costs.mkdir()
    architecture.mkdir()
    config = MeasureCostsConfig(space=SPACE, workloads=(LONG,), source="model")
    measure_costs.run(config, parent=tiny_parent, output=costs, scratch=tmp_path)
    wanted = SearchArchitectureConfig(max_experts_ratio=0.75, min_windowed_share=0.5, frontier_points=3)
    given = {"parent": tiny_parent, "scores": scores, "costs": costs}
    search_architecture.run(wanted, **given, output=architecture, scratch=tmp_path)
    found = json.loads((architecture / "architecture.json").read_text())
    measured = {"blocks": [], "sum": 0.3, "expected": 0.3, "measured": 0.35}
    found["refinement"] = {"metric": "hidden_mse", "evaluations": [measured]}
    write(architecture, "architecture.json", found)
    points = [point(model, (256, 64, 4), speed) for model, speed in (("parent", 100.0), ("child", 130.0))]
    hardware = {"device": "cpu", "name": "test", "num_threads": 1, "by_block": False}
    return {
        "ranking": ranking,
        "scores": scores,
        "costs": costs,
        "architecture": architecture,
        "evaluation_parent": write(tmp_path / "p", "evaluation.json", evaluation("parent", 0.5, 0.9)),
        "evaluation_child": write(tmp_path / "c", "evaluation.json", evaluation("puzzle", 0.4, 0.8)),
        "baselines": [write(tmp_path / "g", "evaluation.json", evaluation("greedy", 0.3, 0.7))],
        "measurements": write(tmp_path / "m", "measurements.json", {"hardware": hardware, "points": points}),
    }


def test_page_pictures_and_summary(stages: dict[str, Path | list[Path]], tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    metrics = report.run(ReportConfig(title="A test"), **stages, output=output, scratch=tmp_path)
    assert {path.stem for path in output.glob("*.png")} == NAMES
    summary = json.loads((output / "summary.json").read_text())
    assert "<title>A test</title>" in (output / "report.html").read_text()
    assert summary["experts"]["ratio"] <= 0.75
    assert summary["windowed_layers"]["windowed_in_child"] >= 1
    assert summary["predictions"][0]["measured"]["throughput"] == pytest.approx(1.3)
    assert metrics["retention_high"] == pytest.approx(0.8 / 0.9)
    assert metrics["speedup_256_64"] == pytest.approx(1.3)


def test_recovery_is_reported_when_it_is_given(stages: dict[str, Path | list[Path]], tmp_path: Path) -> None:
    points = [point(model, (256, 64, 4), speed) for model, speed in (("parent", 90.0), ("child", 108.0))]
    given = {
        "recovery": write(tmp_path / "r", "recovery.json", recovery()),
        "recovery_baseline": write(tmp_path / "u", "recovery.json", recovery("uniform", BASELINE)),
        "evaluation_parent_fp8": write(tmp_path / "f", "evaluation.json", evaluation("parent", 0.5, 0.88)),
        "measurements_baseline": write(tmp_path / "b", "measurements.json", {"points": points}),
    }
    output = tmp_path / "output"
    output.mkdir()
    metrics = report.run(ReportConfig(), **stages, **given, output=output, scratch=tmp_path)
    expected = (NAMES - {"efforts"}) | {"contributions", "retention", "tokens", "distillation"}
    assert {path.stem for path in output.glob("*.png")} == expected
    found = json.loads((output / "summary.json").read_text())["recovery"]
    assert found["retention"] == pytest.approx({"low": 1.02, "high": 1.0})
    assert metrics["retention_low"] == pytest.approx(1.02)
    assert metrics["retention_pruned_low"] == pytest.approx(0.8)
    assert metrics["recovered_by_distillation_high"] == pytest.approx(0.8)
    assert metrics["tokens_ratio_high"] == pytest.approx(0.75)
    assert metrics["request_efficiency"] == pytest.approx(1.3 / 0.75)
    assert metrics["points_above_baseline"] == pytest.approx(7.5)


def test_recovery_alone_is_enough(stages: dict[str, Path | list[Path]], tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    given = {"recovery": write(tmp_path / "r", "recovery.json", recovery())}
    metrics = report.run(ReportConfig(), **stages, **given, output=output, scratch=tmp_path)
    assert metrics["retention_high"] == pytest.approx(1.0)
    assert "points_above_baseline" not in metrics


def test_serving_is_reported_when_it_is_given(stages: dict[str, Path | list[Path]], tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    given = {"serving": write(tmp_path / "s", "measurements.json", serving())}
    metrics = report.run(ReportConfig(), **stages, **given, output=output, scratch=tmp_path)
    pictures = {path.stem for path in output.glob("*.png")}
    assert pictures == NAMES | {"served_frontier", "served_throughput", "served_latency"}
    assert metrics["served_speedup_long"] == pytest.approx(1.55)
    assert metrics["served_request_efficiency"] > 1


def test_a_missing_or_broken_input_is_named(stages: dict[str, Path | list[Path]], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match=r"empty/evaluation\.json does not exist"):
        report.run(ReportConfig(), **(stages | {"evaluation_child": empty}), output=empty, scratch=tmp_path)
    (empty / "scores.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"scores\.json is not valid JSON"):
        report.run(ReportConfig(), **(stages | {"scores": empty}), output=empty, scratch=tmp_path)
    assert not list(empty.glob("*.html"))

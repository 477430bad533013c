"""From scores and costs to architecture.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError, ConfigError, InfeasibleError
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.library import variants_of
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.search_architecture import run as search_architecture
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.space import SearchSpace

SPACE = SearchSpace(expert_counts=(8, 6, 4, 2), windows=(64, 8))
LONG = Workload(name="long", input_tokens=256, output_tokens=64, concurrency=512)
CONFIG = SearchArchitectureConfig(
    limits={"long": Limits(memory_ratio=0.8, throughput_ratio=1.01)},
    max_experts_ratio=0.75,
    min_windowed_share=0.5,
    frontier_points=4,
    num_solutions=2,
)


@pytest.fixture
def costs(tiny_parent: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "costs"
    directory.mkdir()
    config = MeasureCostsConfig(space=SPACE, workloads=(LONG,), source="model")
    measure_costs.run(config, parent=tiny_parent, output=directory, scratch=tmp_path)
    return directory


@pytest.fixture
def scores(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    directory = tmp_path / "scores"
    directory.mkdir()
    parent = tiny_checkpoint.architecture
    rows = [
        dict(layer=layer, **block.as_config(), damage=_damage(layer, block, whole))
        for layer, whole in enumerate(parent.blocks)
        for block in variants_of(whole, SPACE)
    ]
    content = {"parent": [block.as_config() for block in parent.blocks], "rows": rows}
    (directory / "scores.json").write_text(json.dumps(content))
    return directory


def _damage(layer: int, block: Block, whole: Block) -> float:
    """Late layers and narrow windows hurt more."""
    lost = whole.num_experts - block.num_experts
    return (layer + 1) * (0.01 * lost**2 + (0 if block.window == whole.window else 4 / (block.window or 1)))


def _run(config: SearchArchitectureConfig, parent: Path, scores: Path, costs: Path, tmp_path: Path) -> dict[str, Any]:
    output = tmp_path / "output"
    output.mkdir(exist_ok=True)
    metrics = search_architecture.run(
        config, parent=parent, scores=scores, costs=costs, output=output, scratch=tmp_path
    )
    content: dict[str, Any] = json.loads((output / "architecture.json").read_text())
    return content | {"metrics": metrics}


def test_the_payload(tiny_parent: Path, tiny_checkpoint: Checkpoint, scores: Path, costs: Path, tmp_path: Path) -> None:
    found = _run(CONFIG, tiny_parent, scores, costs, tmp_path)
    assert list(found["candidates"]) == [
        "puzzle", "puzzle-2", "uniform", "uniform_reap", "greedy", "max_parameters", "random-0", "random-1", "random-2",
    ]  # fmt: skip
    best, metrics = found["candidates"]["puzzle"], found["metrics"]
    child = Architecture.of(Block.from_config(entry) for entry in best["blocks"])
    child.check_child_of(tiny_checkpoint.architecture)
    assert child.num_experts == best["num_experts"] <= 24
    assert sum(block.window is None for block in child.blocks) <= 1
    assert best["status"] == "optimal" and best["gap"] <= 1e-6 and best["bound"] <= best["damage"]
    assert found["parent"]["damage"] == 0 and found["parent"]["status"] == "parent"
    same = "the same assembly as uniform"
    assert found["skipped"].pop("uniform_width").startswith("nothing on offer to all layers (expert width)")
    assert found["skipped"] == {"uniform_memory": same, "uniform_throughput": same}
    reap = found["candidates"]["uniform_reap"]
    assert (reap["keeps"], reap["damage"]) == ("reap", None) and best["keeps"] == "order"
    assert found["limits"]["experts"] == {"at_most": 24, "unit": ""}
    assert found["limits"]["throughput of long"]["at_least"] > found["parent"]["throughput_tokens_per_s"]["long"]
    assert found["swept"] == "throughput of long" and not found["is_sorting"]
    assert metrics["damage"] == best["damage"]
    assert metrics["experts_ratio"] == best["num_experts"] / 32
    assert metrics["memory_ratio_long"] <= 0.8 and metrics["throughput_ratio_long"] >= 1.01
    for name in found["candidates"].keys() - {"puzzle", "uniform_reap"}:
        assert metrics[f"damage_{name}"] >= best["damage"], name


def test_a_baseline_that_cannot_keep_the_limits_is_reported(
    tiny_parent: Path, scores: Path, costs: Path, tmp_path: Path
) -> None:
    """The last layer offers no fewer experts, so no count is on offer in all layers but the parent's own."""
    content = json.loads((scores / "scores.json").read_text())
    content["rows"] = [row for row in content["rows"] if row["layer"] != 3 or row["num_local_experts"] == 8]
    (scores / "scores.json").write_text(json.dumps(content))
    found = _run(SearchArchitectureConfig(max_experts_ratio=0.6), tiny_parent, scores, costs, tmp_path)
    assert "uniform" not in found["candidates"]
    assert found["skipped"]["uniform"].startswith("nothing on offer to all layers (experts, experts per token")
    assert set(found["candidates"]) >= {"puzzle", "greedy", "max_parameters"}


def test_missing_diverse_solutions_are_reported(tiny_parent: Path, scores: Path, costs: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"diversity": 0.1, "num_solutions": 60})
    found = _run(config, tiny_parent, scores, costs, tmp_path)
    assert "puzzle-60" in found["skipped"]
    assert "puzzle-2" in found["candidates"]


def test_unreachable_limits_leave_nothing_behind(tiny_parent: Path, scores: Path, costs: Path, tmp_path: Path) -> None:
    config = SearchArchitectureConfig(max_experts_ratio=0.1)
    with pytest.raises(InfeasibleError, match="experts <= 3, the best reachable is 8"):
        _run(config, tiny_parent, scores, costs, tmp_path)
    assert list((tmp_path / "output").iterdir()) == []


def test_unknown_workloads_are_refused(tiny_parent: Path, scores: Path, costs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lang', which was not costed"):
        _run(SearchArchitectureConfig(limits={"lang": Limits()}), tiny_parent, scores, costs, tmp_path)


def _edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_artifacts_that_do_not_belong_together_are_refused(
    tiny_parent: Path, scores: Path, costs: Path, tmp_path: Path
) -> None:
    originals = {path: path.read_text() for path in (scores / "scores.json", costs / "costs.json")}

    def refused(path: Path, change: Any, message: str) -> None:
        _edit(path, change)
        with pytest.raises(ArtifactError, match=message):
            _run(CONFIG, tiny_parent, scores, costs, tmp_path)
        path.write_text(originals[path])

    in_scores, in_costs = originals
    refused(in_scores, lambda c: c["parent"].pop(), "scores.json is of another parent")
    refused(in_costs, lambda c: c["parent"].pop(), "costs.json is of another parent")
    refused(in_costs, lambda c: c["fixed"].update(parameters=1), "the parent has .*; run measure_costs on it")
    refused(in_costs, lambda c: c.pop("rows"), "run measure_costs again")
    refused(in_costs, lambda c: c["rows"].pop(), "is scored but not in the cost table")
    refused(in_scores, lambda c: c["rows"].append(c["rows"][0]), "the same block of a layer twice")
    refused(in_scores, lambda c: c["rows"][0].pop("damage"), "run score_blocks again")
    refused(in_scores, lambda c: c["rows"].pop(0), "no row for layer 0 as it is in the parent")


def test_missing_files_are_refused(tiny_parent: Path, scores: Path, costs: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"costs\.json does not exist"):
        _run(CONFIG, tiny_parent, scores, tmp_path, tmp_path)
    (scores / "scores.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        _run(CONFIG, tiny_parent, scores, costs, tmp_path)

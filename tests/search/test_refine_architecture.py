"""refine_architecture on a tiny model: damages are those of really pruned children, and nothing is measured twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.costs.workload import Workload
from moesaic.models import layers, loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.probing import Probes
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.search.rank_experts import run as rank_experts
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture import run as refine_architecture
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks import run as score_blocks
from moesaic.search.score_blocks.damage import compare, finish
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.search_architecture import run as search_architecture
from moesaic.search.search_architecture.stage import SearchArchitectureConfig
from moesaic.search.space import SearchSpace
from tests.search.test_score_blocks import write_set

SPACE = SearchSpace(expert_counts=(6, 4), experts_per_token=(1,), windows=(16, 4))
LONG = Workload(name="long", input_tokens=256, output_tokens=64, concurrency=4)
SCORES = ScoreBlocksConfig(space=SPACE, metric="kl", batch_tokens=1600)
CONFIG = RefineArchitectureConfig.like(SCORES, evaluations=7)


@pytest.fixture(scope="module")
def inputs(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("refine")
    made = {name: directory / name for name in ("ranking", "scores", "costs", "architecture")}
    for path in made.values():
        path.mkdir()
    short, long = write_set(directory / "short.jsonl", 6, 4, 10), write_set(directory / "long.jsonl", 5, 30, 20)
    sets = {"calibration_short": short, "calibration_long": long}
    where = {"parent": tiny_parent, "scratch": directory}
    rank_experts.run(RankExpertsConfig(), calibration_short=short, output=made["ranking"], **where)
    score_blocks.run(SCORES, ranking=made["ranking"], **sets, output=made["scores"], **where)
    costing = MeasureCostsConfig(space=SPACE, workloads=(LONG,), source="model")
    measure_costs.run(costing, output=made["costs"], **where)
    search_architecture.run(
        SearchArchitectureConfig(max_experts_ratio=0.75, min_windowed_share=0.5, frontier_points=2),
        scores=made["scores"],
        costs=made["costs"],
        output=made["architecture"],
        **where,
    )
    return {"parent": tiny_parent, **made, **sets}


def refine(inputs: dict[str, Path], place: Path, config: RefineArchitectureConfig = CONFIG) -> dict[str, Any]:
    """Run the stage; a scratch directory that exists already is used again."""
    output, scratch = place / "output", place / "scratch"
    output.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    refine_architecture.run(config, **inputs, output=output, scratch=scratch)
    return json.loads((output / "architecture.json").read_text())


@pytest.fixture(scope="module")
def refined(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return refine(inputs, tmp_path_factory.mktemp("refined"))


def pruned_damage(inputs: dict[str, Path], architecture: Path, scratch: Path) -> float:
    """KL on both sets of the checkpoint that ``prune_model`` makes of the candidate ``puzzle``, layer by layer."""
    child_path = scratch / "child"
    child_path.mkdir()
    given = {name: inputs[name] for name in ("parent", "ranking")}
    prune_model.run(PruneModelConfig(), **given, architecture=architecture, output=child_path, scratch=scratch)
    parent = Checkpoint.open(inputs["parent"])
    probes = Probes.read(CONFIG, parent, inputs["calibration_short"], inputs["calibration_long"], (4, 16), 4)

    def states(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
        (hidden,) = loading.embed(checkpoint, [tokens])
        for layer, block in enumerate(checkpoint.architecture.blocks):
            rotary = loading.rotary(checkpoint, 64)
            hidden = layers.run_block(loading.load_block(checkpoint, layer), hidden, rotary, block.window)
        return loading.load_head(checkpoint).norm(hidden)

    damages = []
    for some in (probes.short, probes.long):
        sums = []
        for probe in some:
            whole, cut = (states(each, probe.batch.token_ids) for each in (parent, Checkpoint.open(child_path)))
            head, at = loading.load_head(parent), probe.measured
            sums.append(compare(head, whole[at], cut[at].unsqueeze(0), probe.next_ids, probe.weights)[0])
        damages.append(finish(torch.stack(sums).sum(0))["kl"])
    return sum(damages)


def test_the_choice_is_the_best_measured_and_its_damage_that_of_the_pruned_model(
    refined: dict[str, Any], inputs: dict[str, Path], tmp_path: Path
) -> None:
    rows = refined["refinement"]["evaluations"]
    assert len(rows) == 7
    best = min(rows, key=lambda row: row["measured"])
    chosen = refined["candidates"]["puzzle"]
    assert chosen["blocks"] == best["blocks"]
    assert chosen["measured"] == best["measured"] <= rows[0]["measured"]
    (tmp_path / "architecture.json").write_text(json.dumps(refined))
    assert pruned_damage(inputs, tmp_path, tmp_path) == pytest.approx(best["measured"], rel=1e-3)


def test_the_searchs_own_choice_and_its_rivals_are_measured_first(
    refined: dict[str, Any], inputs: dict[str, Path]
) -> None:
    before = json.loads((inputs["architecture"] / "architecture.json").read_text())["candidates"]
    named = [before[name]["blocks"] for name in ("puzzle", "greedy", "uniform") if name in before]
    distinct = [blocks for index, blocks in enumerate(named) if blocks not in named[:index]]
    assert [row["blocks"] for row in refined["refinement"]["evaluations"][: len(distinct)]] == distinct
    for name in ("greedy", "uniform"):
        assert refined["candidates"][name]["measured"] > 0
    assert refined["candidates"]["uniform_reap"]["measured"] is None, "what was run kept other experts"
    if refined["candidates"]["puzzle"]["blocks"] != before["puzzle"]["blocks"]:
        assert refined["candidates"]["unrefined"]["blocks"] == before["puzzle"]["blocks"]


def test_every_assembly_keeps_the_limits_and_is_new(refined: dict[str, Any]) -> None:
    seen = [row["blocks"] for row in refined["refinement"]["evaluations"]]
    assert len({json.dumps(blocks) for blocks in seen}) == len(seen)
    for blocks in seen:
        assert sum(block["num_local_experts"] for block in blocks) <= 0.75 * 4 * 8
        assert sum(blocks[layer]["sliding_window"] is not None for layer in (1, 3)) >= 1


def test_killed_it_goes_on_with_what_was_measured(
    refined: dict[str, Any], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second round of four and three; the next run measures three and ends alike."""
    run_assemblies, rounds = refine_architecture.run_assemblies, []

    def killed(*arguments: Any) -> Any:
        rounds.append(len(arguments[3]))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return run_assemblies(*arguments)

    monkeypatch.setattr(refine_architecture, "run_assemblies", killed)
    with pytest.raises(KeyboardInterrupt):
        refine(inputs, tmp_path)
    assert not list((tmp_path / "output").iterdir())
    assert refine(inputs, tmp_path) == refined
    assert sum(rounds) == 7 + rounds[2]


def test_one_evaluation_measures_the_searchs_choice_and_keeps_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = refine(inputs, tmp_path, CONFIG.but(evaluations=1))
    before = json.loads((inputs["architecture"] / "architecture.json").read_text())["candidates"]
    assert found["candidates"]["puzzle"] == before["puzzle"] | {
        "measured": found["refinement"]["evaluations"][0]["measured"]
    }
    assert "unrefined" not in found["candidates"]


def test_damage_must_be_measured_as_the_scores_were(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refine_architecture has metric 'cosine', the scores were made with 'kl'"):
        refine(inputs, tmp_path, CONFIG.but(metric="cosine"))

"""Simulated peaks against those of the same functions on real tensors, and computed ones against both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.core.process_group import BatchShare
from moesaic.costs.facts import Facts, PipelineTask
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.data.batches import Batch
from moesaic.models import loading, streaming
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import GPT_OSS, GPT_OSS_120B
from moesaic.models.layers import run_block
from moesaic.models.peak import Peak
from moesaic.models.simulated_memory import peak_of
from moesaic.models.synthesis import Model, write_synthetic
from moesaic.platform.planning.devices import STATE_SHARE
from moesaic.recover.calibrate_kv.needs import needs as calibration_needs
from moesaic.recover.calibrate_kv.simulated_memory import calibration_peak
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.search.library import variants_of
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.rank_experts.needs import needs as ranking_needs
from moesaic.search.rank_experts.run import _rank
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture.assemblies import run_assemblies
from moesaic.search.refine_architecture.needs import needs as refinement_needs
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.needs import needs as scoring_needs
from moesaic.search.score_blocks.scoring import Probe, Variant, run_parent, score_layer
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.simulated_memory import ranking_peak, refinement_peak, scoring_peak
from moesaic.search.space import SearchSpace

SHAPE = ModelShape(
    family=GPT_OSS,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    max_positions=8192,
)
PARENT = Architecture.of([Block(8, 2, 256, 64), Block(8, 2, 256)])
SPACE = SearchSpace(expert_counts=(8, 7, 6), expert_widths=(192,), windows=(64,))
LENGTH, ROWS = 1024, 4
SCORES = ScoreBlocksConfig(
    space=SPACE, max_sequences=ROWS, max_tokens=LENGTH, batch_tokens=2 * ROWS * LENGTH, variants_per_batch=2
)
RANKING = RankExpertsConfig(max_sequences=ROWS, max_tokens=LENGTH, batch_tokens=ROWS * LENGTH)
REFINEMENT = RefineArchitectureConfig.like(SCORES).but(assemblies_per_round=2)
CALIBRATION = CalibrateKvConfig(max_sequences=ROWS, max_tokens=LENGTH, batch_tokens=ROWS * LENGTH, precision="float32")
STAGES: dict[str, tuple[Any, Callable[..., Peak], Callable[..., Any]]] = {
    "rank_experts": (RANKING, ranking_peak, ranking_needs),
    "score_blocks": (SCORES, scoring_peak, scoring_needs),
    "refine_architecture": (REFINEMENT, refinement_peak, refinement_needs),
    "calibrate_kv": (CALIBRATION, calibration_peak, calibration_needs),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("synthetic") / "model"
    write_synthetic(Model(SHAPE, PARENT, 1), directory)
    return Checkpoint.open(directory)


def batch() -> Batch:
    ids = torch.randint(SHAPE.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))


def rank(checkpoint: Checkpoint, scratch: Path) -> None:
    list(_rank(RANKING, checkpoint, [batch()], scratch, BatchShare()))


def score(checkpoint: Checkpoint, scratch: Path) -> None:
    probes = Probes([Probe.of(batch())], [])
    with open_parent(SCORES, checkpoint, probes, scratch, BatchShare()) as parent:
        measured = run_parent(parent, embed(SCORES, checkpoint, parent, probes.all), probes.all, lambda _: None)
        states = embed(SCORES, checkpoint, parent, probes.all)
        offered = [kept(block) for block in variants_of(PARENT.blocks[0], SPACE)]
        score_layer(parent, 0, states, measured, offered, 2, lambda _: None)


def refine(checkpoint: Checkpoint, scratch: Path) -> None:
    probes = Probes([Probe.of(batch())], [])
    with open_parent(REFINEMENT, checkpoint, probes, scratch, BatchShare()) as parent:
        measured = run_parent(parent, embed(REFINEMENT, checkpoint, parent, probes.all), probes.all, lambda _: None)
        states = embed(REFINEMENT, checkpoint, parent, probes.all)
        assembled = [(kept(Block(number, 2, 256, 64)), kept(Block(8, 2, 256))) for number in (7, 8)]
        run_assemblies(parent, states, measured, assembled, lambda _: None)


def calibrate(checkpoint: Checkpoint, _: Path) -> None:
    (states,) = loading.embed(checkpoint, [batch().token_ids])
    rotary = loading.rotary(checkpoint, LENGTH)
    run_block(loading.load_block(checkpoint, 1), states, rotary, None)


def kept(block: Block) -> Variant:
    channels = torch.arange(block.expert_width).expand(8, -1) if block.expert_width < 256 else None
    return Variant(block, tuple(range(block.num_experts)), channels)


REAL = {"rank_experts": rank, "score_blocks": score, "refine_architecture": refine, "calibrate_kv": calibrate}


@pytest.mark.parametrize("stage", REAL)
def test_simulated_and_computed_peaks_are_those_of_real_tensors(
    stage: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(streaming.STATE_MEMORY, "0")
    config, simulate, needs = STAGES[stage]
    with torch.inference_mode():
        measured = peak_of(lambda: REAL[stage](checkpoint, tmp_path)).total
    peak = simulate(config, SHAPE, PARENT, True, False)
    simulated = peak.total
    computed = needs(PipelineTask(stage, stage, config, ()), Facts(SHAPE, PARENT, True, PARENT, None), [{"parent": 0}])
    assert measured == pytest.approx(simulated, rel=0.1)
    assert computed.device_bytes == pytest.approx(simulated, rel=0.1)
    for what, size in computed.device.items():
        assert size == pytest.approx(peak.parts[what], rel=0.15, abs=0.02 * simulated), what


@pytest.mark.parametrize("stage", REAL)
def test_computed_peaks_of_a_gpu_are_the_simulated_ones(stage: str) -> None:
    """Layers of gpt-oss-120b's true width with fewer experts."""
    config, simulate, needs = STAGES[stage]
    parent = Architecture.of([Block(8, 2, 2880, 128), Block(8, 2, 2880)])
    config = config.but(max_tokens=16_384, max_sequences=8, batch_tokens=65_536, precision="bfloat16")
    facts = Facts(GPT_OSS_120B, parent, True, parent, Target(read_table("h100"), GPT_OSS_120B, 8, "fp8"))
    computed = needs(PipelineTask(stage, stage, config, ()), facts, [{"parent": 0}]).device_bytes
    assert simulate(config, replace(GPT_OSS_120B), parent, True, True).total == pytest.approx(computed, rel=0.1)


def test_states_take_the_share_of_a_gpu_that_plans_say() -> None:
    assert streaming._DEVICE_SHARE == STATE_SHARE

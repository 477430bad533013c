"""Memory of ranking, scoring, refinement and calibration: simulated at full size, and measured where that is possible.

Simulated (``moesaic.models.simulated_memory``): the real functions on tensors without values, for gpt-oss-120b and
gpt-oss-20b as their recipes for H100 have it. Beside each stands what ``moesaic plan`` computes by its formula.

Measured: each on a CPU with real tensors, two layers of gpt-oss's true width, few experts and a small vocabulary, in a
process of its own: the growth of its resident memory from before the first layer is read to its highest, as the kernel
counts it. glibc is told to give freed blocks of 256 KiB and more back.

Run: python benchmarks/search_memory.py [--record FILE]; 3 minutes on two cores.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bars import Bar, conclude, resident_bytes, return_freed_memory

from moesaic.core.process_group import BatchShare
from moesaic.costs.facts import Facts, PipelineTask
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.data.batches import Batch
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.gpt_oss import GPT_OSS_120B
from moesaic.models.synthesis import find_model, scale_model, write_synthetic
from moesaic.pipelines.recipes import RECIPES
from moesaic.recover.calibrate_kv.modelopt import _calibrate
from moesaic.recover.calibrate_kv.simulated_memory import calibration_peak
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.search.damage_config import DamageConfig
from moesaic.search.library import variants_of
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.rank_experts.run import _rank
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture.assemblies import run_assemblies
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.scoring import (
    Measurement,
    Offloaded,
    Parent,
    Probe,
    Variant,
    advance,
    run_parent,
    score_layer,
)
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.simulated_memory import ranking_peak, refinement_peak, scoring_peak
from moesaic.search.space import SearchSpace
from moesaic.stages import find_stage

GIB = 2**30
SIMULATED = {
    "rank_experts": ranking_peak,
    "score_blocks": scoring_peak,
    "refine_architecture": refinement_peak,
    "calibrate_kv": calibration_peak,
}
MODELS = {"gpt-oss-120b": ("gpt_oss_120b_h100x8", 8), "gpt-oss-20b": ("gpt_oss_20b_h100x1", 1)}


def full_size(name: str) -> list[dict[str, Any]]:
    """Every stage of a model's recipe."""
    recipe_name, num_gpus = MODELS[name]
    recipe, parent = RECIPES[recipe_name](), find_model(name).architecture
    target = Target(read_table("h100"), GPT_OSS_120B, num_gpus, "fp8", "tensorrt_llm")
    facts, rows = Facts(GPT_OSS_120B, parent, True, parent, target), []
    for stage, simulate in SIMULATED.items():
        config: Any = getattr(recipe, stage)
        needs = find_stage(stage).planned_by("needs")
        assert needs is not None
        computed = needs(PipelineTask(stage, stage, config, ()), facts, [{"parent": 0}])
        rows.append(
            {
                "model": name,
                "stage": stage,
                "simulated_gib": (peak := simulate(config, GPT_OSS_120B, parent, True, True)).total / GIB,
                "parts_gib": {what: size / GIB for what, size in peak.parts.items()},
                "computed_gib": computed.device_bytes / GIB,
                "host_gib": computed.host_bytes / GIB,
                "states_gib": computed.state_bytes / GIB,
            }
        )
    return rows


def two_layers() -> list[dict[str, Any]]:
    """Every stage on real tensors against its simulation, each in a process of its own."""
    os.environ["MOESAIC_STATE_MEMORY_MIB"] = "0"
    model = scale_model(find_model("gpt-oss-120b"), num_layers=2, num_experts=8, num_shards=1)
    model = replace(model, shape=replace(model.shape, vocab_size=4096))
    rows = []
    with TemporaryDirectory() as place:
        directory = Path(place)
        write_synthetic(model, directory / "model")
        for stage, (config, measured) in MEASURED.items():
            (scratch := directory / stage).mkdir()
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                used = pool.submit(measured, config, directory / "model", scratch).result()
            peak = SIMULATED[stage](config, model.shape, model.architecture, True, False)
            rows.append({"stage": stage, "measured_mib": used / 2**20, "simulated_mib": peak.total / 2**20})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _grown(work: Callable[[], object]) -> int:
    """By how many bytes resident memory is higher at its highest than before."""
    before = resident_bytes("VmRSS")
    with torch.inference_mode():
        work()
    return resident_bytes("VmHWM") - before


def _batch(checkpoint: Checkpoint, rows: int) -> Batch:
    ids = torch.randint(checkpoint.shape.vocab_size, (rows, 1024), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, every, every)


def _ranked(config: RankExpertsConfig, model: Path, scratch: Path) -> int:
    checkpoint = Checkpoint.open(model)
    ranked = _rank(config, checkpoint, [_batch(checkpoint, 4)], scratch, BatchShare())
    return _grown(lambda: list(ranked))


def _scored(config: ScoreBlocksConfig, model: Path, scratch: Path) -> int:
    checkpoint = Checkpoint.open(model)

    def score(parent: Parent, states: list[Offloaded], measurements: list[Measurement]) -> None:
        for layer, own in enumerate(checkpoint.architecture.blocks):
            offered = [_variant(block) for block in variants_of(own, config.space)]
            score_layer(parent, layer, states, measurements, offered, config.variants_per_batch, _ignored, prove=False)
            if layer < parent.last:
                states = advance(parent, layer, states)

    return _damaged(config, checkpoint, scratch, config.variants_per_batch, score)


def _refined(config: RefineArchitectureConfig, model: Path, scratch: Path) -> int:
    checkpoint = Checkpoint.open(model)
    first, last = checkpoint.architecture.blocks
    fewer = [[_variant(replace(block, num_experts=count)) for block in (first, last)] for count in (7, 8)]
    assembled = [(fewer[number % 2][0], fewer[number // 2][1]) for number in range(config.assemblies_per_round)]

    def refine(parent: Parent, states: list[Offloaded], measurements: list[Measurement]) -> None:
        run_assemblies(parent, states, measurements, assembled, _ignored)

    return _damaged(config, checkpoint, scratch, config.assemblies_per_round, refine)


def _damaged(
    config: DamageConfig,
    checkpoint: Checkpoint,
    scratch: Path,
    at_once: int,
    measure: Callable[[Parent, list[Offloaded], list[Measurement]], None],
) -> int:
    """As ``score_blocks`` and ``refine_architecture`` run, on one batch."""
    probe = Probe.of(_batch(checkpoint, config.batch_tokens // at_once // 1024))
    probes = Probes((probe,), ())
    with open_parent(config, checkpoint, probes, scratch, BatchShare()) as parent:

        def work() -> None:
            measurements = run_parent(parent, embed(config, checkpoint, parent, [probe]), [probe], _ignored)
            measure(parent, embed(config, checkpoint, parent, [probe]), measurements)

        return _grown(work)


def _calibrated(config: CalibrateKvConfig, model: Path, scratch: Path) -> int:
    """Without the states, which are the host's where a GPU computes, and what ModelOpt imports at its first layer."""
    checkpoint = Checkpoint.open(model)
    batch = _batch(checkpoint, 4)
    tokens, is_token = batch.token_ids, batch.is_token
    list(_calibrate(checkpoint, [(tokens[:1, :8], is_token[:1, :8])], torch.float32))
    Path("/proc/self/clear_refs").write_text("5")  # the highest is counted from here
    states = tokens.numel() * checkpoint.shape.hidden_size * torch.float32.itemsize
    return _grown(lambda: list(_calibrate(checkpoint, [(tokens, is_token)], torch.float32))) - states


def _variant(block: Block) -> Variant:
    return Variant(block, tuple(range(block.num_experts)))


def _ignored(_: int) -> None:
    """Nobody watches the steps."""


_DAMAGE: dict[str, Any] = {"max_sequences": 4, "max_tokens": 1024, "max_long_tokens": None, "batch_tokens": 8192}
MEASURED: dict[str, tuple[Any, Callable[[Any, Path, Path], int]]] = {
    "rank_experts": (RankExpertsConfig(max_sequences=4, max_tokens=1024, batch_tokens=4096), _ranked),
    "score_blocks": (
        ScoreBlocksConfig(space=SearchSpace(expert_counts=(6,), windows=(64,)), variants_per_batch=2, **_DAMAGE),
        _scored,
    ),
    "refine_architecture": (RefineArchitectureConfig(assemblies_per_round=4, **_DAMAGE), _refined),
    "calibrate_kv": (
        CalibrateKvConfig(max_sequences=4, max_tokens=1024, batch_tokens=4096, precision="float32"),
        _calibrated,
    ),
}
"""Small configs, and what measures the stage under them."""


def main() -> None:
    """Measure and simulate, and hold both against the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write")
    options = parser.parse_args()
    return_freed_memory()
    small = two_layers()
    rows = [row for name in MODELS for row in full_size(name)]
    ratios = [row["computed_gib"] / row["simulated_gib"] for row in rows]
    bars = [
        bar
        for row in small
        for ratio in [row["measured_mib"] / row["simulated_mib"]]
        for what in [f"{row['stage']}: measured over simulated, two layers of true width"]
        for bar in (Bar(what, ratio, least=0.9), Bar(what, ratio, most=1.1))
    ]
    bars += [
        Bar("computed over simulated, largest", max(ratios), most=1.1),
        Bar("computed over simulated, smallest", min(ratios), least=0.9),
    ]
    found = {"two_layers": small, "full_size": rows}
    conclude("python benchmarks/search_memory.py", bars, found, options.record)


if __name__ == "__main__":
    main()

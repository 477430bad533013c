"""Memory of ranking, scoring, refinement and calibration: simulated at full size, and measured where that is possible.

Simulated (``moesaic.models.simulated_memory``): the real functions on tensors without values, for gpt-oss-120b and
gpt-oss-20b as their recipes for H100 have it. Beside each stands what ``moesaic plan`` computes by its formula.

Measured: the same on a CPU with real tensors, two layers of gpt-oss's true width, few experts and a small vocabulary:
the growth of the process's resident memory to its highest, as the kernel counts it. glibc is told to give freed blocks
of 256 KiB and more back.

Run: python benchmarks/search_memory.py [--record FILE]; minutes on two cores.
"""

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import replace
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
from moesaic.models import loading
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.gpt_oss import GPT_OSS_120B
from moesaic.models.layers import run_block
from moesaic.models.synthesis import find_model, scale_model, write_synthetic
from moesaic.pipelines.recipes import RECIPES
from moesaic.recover.calibrate_kv.simulated_memory import calibration_peak
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.rank_experts.run import _rank
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture.assemblies import run_assemblies
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.scoring import Probe, Variant, run_parent, score_layer
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.simulated_memory import ranking_peak, refinement_peak, scoring_peak
from moesaic.search.space import SearchSpace
from moesaic.stages import find_stage

MIB, GIB = 2**20, 2**30
SIMULATED = {
    "rank_experts": ranking_peak,
    "score_blocks": scoring_peak,
    "refine_architecture": refinement_peak,
    "calibrate_kv": calibration_peak,
}
MODELS = {"gpt-oss-120b": ("gpt_oss_120b_h100x8", 8), "gpt-oss-20b": ("gpt_oss_20b_h100x1", 1)}
RANKING = RankExpertsConfig(max_sequences=4, max_tokens=512, batch_tokens=2048)
SPACE = SearchSpace(expert_counts=(4, 3), windows=(128,))
SCORES = ScoreBlocksConfig(space=SPACE, max_sequences=4, max_tokens=512, batch_tokens=4096, variants_per_batch=2)
REFINEMENT = RefineArchitectureConfig.like(SCORES).but(assemblies_per_round=2)
CALIBRATION = CalibrateKvConfig(max_sequences=4, max_tokens=512, batch_tokens=2048, precision="float32")


def full_size(name: str) -> list[dict[str, Any]]:
    """Every stage of a model's recipe."""
    recipe_name, num_gpus = MODELS[name]
    recipe, parent = RECIPES[recipe_name](), find_model(name).architecture
    target = Target(read_table("h100"), GPT_OSS_120B, num_gpus, "fp8", "tensorrt_llm")
    facts, rows = Facts(GPT_OSS_120B, parent, True, parent, target), []
    for stage, simulate in SIMULATED.items():
        config: Any = getattr(recipe, stage)
        needs = find_stage(stage).needs
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


def two_layers() -> dict[str, dict[str, float]]:
    """Every stage on real tensors against its simulation, one after the other."""
    os.environ["MOESAIC_STATE_MEMORY_MIB"] = "0"
    model = scale_model(find_model("gpt-oss-120b"), num_layers=2, num_experts=4, num_shards=1)
    model = replace(model, shape=replace(model.shape, vocab_size=4096))
    found = {}
    with TemporaryDirectory() as place:
        write_synthetic(model, Path(place) / "model")
        checkpoint = Checkpoint.open(Path(place) / "model")
        for stage, (config, work) in SMALL.items():
            scratch = Path(place) / stage
            scratch.mkdir()
            measured = growth(lambda: work(checkpoint, scratch))  # noqa: B023 - called at once
            simulated = SIMULATED[stage](config, model.shape, model.architecture, True, False).total
            found[stage] = {"measured_mib": measured / MIB, "simulated_mib": simulated / MIB}
            print(stage, found[stage], flush=True)
    return found


def growth(work: Callable[[], object]) -> int:
    """How much the process's resident memory grows from now to its highest."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
    before = resident_bytes("VmRSS")
    with torch.inference_mode():
        work()
    return resident_bytes("VmHWM") - before


def rank(checkpoint: Checkpoint, scratch: Path) -> None:
    """Rank the experts of both layers."""
    list(_rank(RANKING, checkpoint, [batch(checkpoint)], scratch, BatchShare()))


def score(checkpoint: Checkpoint, scratch: Path) -> None:
    """Score two variants of the first layer at once."""
    probes = Probes([Probe.of(batch(checkpoint))], [])
    with open_parent(SCORES, checkpoint, probes, scratch, BatchShare()) as parent:
        measured = run_parent(parent, embed(SCORES, checkpoint, parent, probes.all), probes.all, lambda _: None)
        states = embed(SCORES, checkpoint, parent, probes.all)
        offered = [kept(replace(checkpoint.architecture.blocks[0], num_experts=number)) for number in (4, 4, 3)]
        score_layer(parent, 0, states, measured, offered, 2, lambda _: None)


def refine(checkpoint: Checkpoint, scratch: Path) -> None:
    """Measure two assemblies at once."""
    probes, blocks = Probes([Probe.of(batch(checkpoint))], []), checkpoint.architecture.blocks
    with open_parent(REFINEMENT, checkpoint, probes, scratch, BatchShare()) as parent:
        measured = run_parent(parent, embed(REFINEMENT, checkpoint, parent, probes.all), probes.all, lambda _: None)
        states = embed(REFINEMENT, checkpoint, parent, probes.all)
        assembled = [(kept(replace(blocks[0], num_experts=number)), kept(blocks[1])) for number in (3, 4)]
        run_assemblies(parent, states, measured, assembled, lambda _: None)


def calibrate(checkpoint: Checkpoint, _: Path) -> None:
    """Run the layer without a window, as calibration does."""
    (states,) = loading.embed(checkpoint, [batch(checkpoint).token_ids])
    rotary = loading.rotary(checkpoint, CALIBRATION.max_tokens)
    run_block(loading.load_block(checkpoint, 1), states, rotary, None)


def batch(checkpoint: Checkpoint) -> Batch:
    """Four sequences of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.shape.vocab_size, (4, RANKING.max_tokens), generator=generator)
    every = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, every, every)


def kept(block: Block) -> Variant:
    """A block with its first experts."""
    return Variant(block, tuple(range(block.num_experts)))


SMALL: dict[str, tuple[Any, Callable[[Checkpoint, Path], None]]] = {
    "rank_experts": (RANKING, rank),
    "score_blocks": (SCORES, score),
    "refine_architecture": (REFINEMENT, refine),
    "calibrate_kv": (CALIBRATION, calibrate),
}


def main() -> None:
    """Measure and simulate, and hold both against the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write")
    options = parser.parse_args()
    return_freed_memory()
    small = two_layers()
    rows = [row for name in MODELS for row in full_size(name)]
    ratios = [row["computed_gib"] / row["simulated_gib"] for row in rows]
    measured = {stage: one["measured_mib"] / one["simulated_mib"] for stage, one in small.items()}
    bars = [
        *(Bar(f"measured over simulated, {stage}, true width", ratio, least=0.9) for stage, ratio in measured.items()),
        *(Bar(f"measured over simulated, {stage}, true width", ratio, most=1.1) for stage, ratio in measured.items()),
        Bar("computed over simulated, largest", max(ratios), most=1.1),
        Bar("computed over simulated, smallest", min(ratios), least=0.9),
    ]
    found = {"two_layers": small, "full_size": rows}
    conclude("python benchmarks/search_memory.py", bars, found, options.record)


if __name__ == "__main__":
    main()

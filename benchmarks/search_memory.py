"""Memory of ranking, scoring, refinement and calibration: simulated at full size, and measured where that is possible.

Simulated (``moesaic.models.simulated_memory``): the real functions on tensors without values, for gpt-oss-120b and
gpt-oss-20b as their recipes for H100 have it. Beside each stands what ``moesaic plan`` computes by its formula.

Measured: ranking on a CPU with real tensors, two layers of gpt-oss's true width, few experts and a small vocabulary:
the growth of its resident memory from before the first layer is read to its highest, as the kernel counts it.
glibc is told to give freed blocks of 256 KiB and more back.

Run: python benchmarks/search_memory.py [--record FILE]; 3 minutes on two cores.
"""

import argparse
import os
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
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.gpt_oss import GPT_OSS_120B
from moesaic.models.synthesis import find_model, scale_model, write_synthetic
from moesaic.pipelines.recipes import RECIPES
from moesaic.recover.calibrate_kv.simulated_memory import calibration_peak
from moesaic.search.rank_experts.run import _rank
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.simulated_memory import ranking_peak, refinement_peak, scoring_peak
from moesaic.stages import find_stage

GIB = 2**30
SIMULATED = {
    "rank_experts": ranking_peak,
    "score_blocks": scoring_peak,
    "refine_architecture": refinement_peak,
    "calibrate_kv": calibration_peak,
}
MODELS = {"gpt-oss-120b": ("gpt_oss_120b_h100x8", 8), "gpt-oss-20b": ("gpt_oss_20b_h100x1", 1)}
SMALL = RankExpertsConfig(max_sequences=4, max_tokens=1024, batch_tokens=4096)


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


def two_layers() -> dict[str, float]:
    """Ranking on real tensors against the simulation."""
    os.environ["MOESAIC_STATE_MEMORY_MIB"] = "0"
    model = scale_model(find_model("gpt-oss-120b"), num_layers=2, num_experts=4, num_shards=1)
    model = replace(model, shape=replace(model.shape, vocab_size=4096))
    ids = torch.randint(model.shape.vocab_size, (4, 1024), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(ids, dtype=torch.bool)
    with TemporaryDirectory() as place:
        write_synthetic(model, Path(place) / "model")
        checkpoint, scratch = Checkpoint.open(Path(place) / "model"), Path(place) / "scratch"
        scratch.mkdir()
        ranked = _rank(SMALL, checkpoint, [Batch(ids, every, every)], scratch, BatchShare())
        before = resident_bytes("VmRSS")
        with torch.inference_mode():
            list(ranked)
        measured = resident_bytes("VmHWM") - before
    simulated = ranking_peak(SMALL, model.shape, model.architecture, True, False).total
    return {"measured_mib": measured / 2**20, "simulated_mib": simulated / 2**20}


def main() -> None:
    """Measure and simulate, and hold both against the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write")
    options = parser.parse_args()
    return_freed_memory()
    small = two_layers()
    print(small, flush=True)
    rows = [row for name in MODELS for row in full_size(name)]
    ratios = [row["computed_gib"] / row["simulated_gib"] for row in rows]
    ratio = small["measured_mib"] / small["simulated_mib"]
    bars = [
        Bar("measured over simulated, two layers of true width", ratio, least=0.9),
        Bar("measured over simulated, two layers of true width", ratio, most=1.1),
        Bar("computed over simulated, largest", max(ratios), most=1.1),
        Bar("computed over simulated, smallest", min(ratios), least=0.9),
    ]
    found = {"two_layers": small, "full_size": rows}
    conclude("python benchmarks/search_memory.py", bars, found, options.record)


if __name__ == "__main__":
    main()

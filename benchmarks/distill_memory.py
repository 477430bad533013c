"""Memory of distillation at full size, simulated; and simulated against measured where a real run is possible.

Simulated (``moesaic.recover.distill.automodel.simulation``): a step of gpt-oss-120b's recipe, rows of 131,072 tokens,
with the released 88B layout as the child, and with the parent itself as the child, on nodes of eight GPUs; on one node
with shorter rows, too; and once with the worst routing there can be. Beside each stands what ``moesaic plan`` computes
by its formula.

Measured: the same step on real tensors, two ranks of a gloo group, two layers of gpt-oss-120b's true width with fewer
experts and a smaller vocabulary, attention by the CPU's own function. It is the growth of rank 0's resident memory from
before the weights exist to its highest, as the kernel counts it, so that gloo's buffers and the libraries' own are in
it. glibc is told to give freed blocks of 256 KiB and more back: by default it keeps those of up to 32 MiB, and a run
with twice the tokens then grew by 27 % more than simulated.

Run: python benchmarks/distill_memory.py [--record FILE]; 15 minutes on two cores.
"""

import argparse
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from bars import Bar, conclude, resident_bytes, return_freed_memory
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesaic.costs.facts import Facts
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import GPT_OSS, GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
from moesaic.models.loading import choose_device
from moesaic.recover.distill.automodel import simulation
from moesaic.recover.distill.automodel.settings import Job
from moesaic.recover.distill.needs import GPUS_PER_NODE, gpu_bytes, simulated_peak
from moesaic.recover.distill.stage import DistillConfig

GIB, BAR_GIB = 2**30, 72.0
LONG = 131_072
CHILDREN = {"released_88b": GPT_OSS_PUZZLE_88B_BLOCKS, "gpt_oss_120b": GPT_OSS_120B_BLOCKS}
POINTS = {
    "released_88b": [(1, 16_384), *((nodes, LONG) for nodes in (1, 2, 4, 8, 16))],
    "gpt_oss_120b": [(nodes, LONG) for nodes in (2, 4, 8)],
}
"""Nodes and tokens of a row, by child."""
TRUE_WIDTH = ModelShape(
    family=GPT_OSS,
    hidden_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=32_768,
    max_positions=131_072,
)
PARENT = Architecture.of([Block(8, 2, 2880, 128), Block(8, 2, 2880, None)])
CHILD = Architecture.of([Block(8, 2, 2880, 128), Block(4, 2, 2880, None)])
SMALL = DistillConfig(
    sequence_tokens=1024, rows_per_step=2, expert_chunk_tokens=512, logits_chunk_tokens=256, hidden_tokens=512
)
_NOWHERE = Path(os.devnull)
_TWO_RANKS = Job(_NOWHERE, _NOWHERE, _NOWHERE, _NOWHERE, 2, True, None)


def simulate_full_size() -> list[dict[str, Any]]:
    """Every child on every number of nodes, and the worst routing."""
    rows = [simulate_point(child, *point) for child, points in POINTS.items() for point in points]
    return [*rows, simulate_point("released_88b", 4, LONG, worst_routing=True)]


def simulate_point(child: str, nodes: int, tokens: int, worst_routing: bool = False) -> dict[str, Any]:
    """One simulation, and what the formula says."""
    target = Target(read_table("h100"), GPT_OSS_120B, GPUS_PER_NODE, "fp8")
    facts = Facts(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, True, CHILDREN[child], target)
    gpus = nodes * GPUS_PER_NODE
    config = DistillConfig(efforts=("medium", "high"), sequence_tokens=tokens, rows_per_step=max(32, gpus))
    start = time.perf_counter()
    peak = simulated_peak(config, facts, nodes, worst_routing)
    row = {
        "child": child,
        "nodes": nodes,
        "gpus": gpus,
        "sequence_tokens": tokens,
        "worst_routing": worst_routing,
        "peak_gib": peak.total / GIB,
        **{f"{part.replace(' ', '_')}_gib": value / GIB for part, value in peak.parts.items()},
        "computed_gib": gpu_bytes(config, facts, gpus) / GIB,
        "simulation_s": time.perf_counter() - start,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def two_layers() -> dict[str, float]:
    """Simulated and measured peaks of the small real run, in MiB."""
    job = replace(_TWO_RANKS, expert_parallel_size=2)
    with TemporaryDirectory() as scratch:
        if (other := os.fork()) == 0:
            os._exit(_succeeds(lambda: _measure(1, Path(scratch), job)))
        _measure(0, Path(scratch), job)
        assert os.waitpid(other, 0)[1] == 0, "the other rank failed"
        measured = int((Path(scratch) / "peak").read_text())
    peak = simulation.simulate(SMALL, TRUE_WIDTH, PARENT, CHILD, job, fused=False, all_chunks=True)
    return {"measured_mib": measured / 2**20, "simulated_mib": peak.total / 2**20}


def _succeeds(action: Any) -> int:
    try:
        action()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _measure(rank: int, scratch: Path, job: Job) -> None:
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'group'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    step = simulation.Step(SMALL, TRUE_WIDTH, PARENT, CHILD, job)
    peak = _run(step, SMALL, TRUE_WIDTH)
    if rank == 0:
        (scratch / "peak").write_text(str(peak))
    dist.destroy_process_group()
    torch.compiler.set_stance("default")


def _run(step: simulation.Step, config: DistillConfig, shape: ModelShape) -> int:
    """Give a step weights and a full batch, run it, and say how many bytes it took at most."""
    on_gpu = step.device.type == "cuda"
    before = 0 if on_gpu else resident_bytes("VmRSS")
    step.materialize()
    for model in (step.teacher_model, *step.model_parts):
        for parameter in model.parameters():
            shard: Any = parameter.detach()
            torch.nn.init.normal_(shard.to_local(), std=0.02)
    batch = simulation.full_batch(config)
    batch["input_ids"] = torch.randint(0, shape.vocab_size, batch["input_ids"].shape)
    batch["position_ids"] = torch.arange(config.sequence_tokens).expand_as(batch["input_ids"])
    step._run_train_optim_step([{name: each.to(step.device) for name, each in batch.items()}], 1.0)
    return torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM") - before


def rank_0_of_two(
    config: DistillConfig, shape: ModelShape, parent: Architecture, child: Architecture
) -> dict[str, float]:
    """Measured and simulated peak, in MiB, of one of two ranks, on the GPU if there is one; in a process of its own.

    Its group passes no messages: what it would have got of the other rank's shards has memory and no meaning. On a CPU
    freed memory must go back to the system (``return_freed_memory``).
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        measured = alone.submit(_measure_alone, config, shape, parent, child).result()
    peak = simulation.simulate(
        config, shape, parent, child, _TWO_RANKS, fused=torch.cuda.is_available(), all_chunks=True
    )
    return {"measured_mib": measured / 2**20, "simulated_mib": peak.total / 2**20}


def _measure_alone(config: DistillConfig, shape: ModelShape, parent: Architecture, child: Architecture) -> int:
    device = choose_device()
    if device.type == "cpu":
        torch.compiler.set_stance("force_eager")
    dist.init_process_group("fake", rank=0, world_size=_TWO_RANKS.num_processes, store=FakeStore())
    torch.manual_seed(0)
    return _run(simulation.Step(config, shape, parent, child, _TWO_RANKS, device), config, shape)


def main() -> None:
    """Measure and simulate, and hold both against the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write")
    options = parser.parse_args()
    return_freed_memory()
    small = two_layers()
    rows = simulate_full_size()
    balanced = [row for row in rows if not row["worst_routing"]]
    ratios = [row["computed_gib"] / row["peak_gib"] for row in balanced]
    released = {row["nodes"]: row["peak_gib"] for row in balanced if row["child"] == "released_88b"}  # long rows last
    fitting = [nodes for nodes, peak in released.items() if peak <= BAR_GIB]
    ratio = small["measured_mib"] / small["simulated_mib"]
    bars = [
        Bar("measured over simulated, two layers of true width", ratio, least=0.9),
        Bar("measured over simulated, two layers of true width", ratio, most=1.1),
        *(
            Bar(f"GiB on each GPU of {nodes} nodes, 88B child, rows of 131,072", released[nodes], most=BAR_GIB)
            for nodes in (4, 8)
        ),
        Bar("GiB on each GPU of 4 nodes with the worst routing", rows[-1]["peak_gib"], most=BAR_GIB),
        Bar("computed over simulated, largest", max(ratios), most=1.05),
        Bar("computed over simulated, smallest", min(ratios), least=0.95),
    ]
    found = {"two_layers": small, "full_size": rows, "fewest_nodes_that_fit": min(fitting)}
    conclude("python benchmarks/distill_memory.py", bars, found, options.record)


if __name__ == "__main__":
    main()

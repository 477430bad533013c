"""What could make a step of vLLM faster at short context, and what makes it slower? One change to the parent at a time.

    python benchmarks/short_context.py [--child runs/demo/child] [--record FILE]

Every model is the tiny reasoner with one thing changed in all layers: half the experts, half their width, one expert
per token in place of two, the windows of a child (which vLLM keeps in more groups of its KV cache), or one layer alone.
All are loaded at once, each in an engine of its own, and take turns; steps are timed as ``measure_costs`` times them
in the engine, without server and client. Ratios are the parent's time over the model's: above 1 is faster.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bars import conclude
from torch import Tensor

from moesaic.deploy.engines.vllm.engine import TimedJob, time_steps
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, write_checkpoint
from moesaic.models.safetensors_files import StoredTensor
from moesaic.pipelines import example
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.search.prune_model.pruning import prune_stored

JOBS = {
    "reading 4 x 128 tokens": TimedJob("prefill", 4, 128),
    "a step of 1 user behind 192 tokens": TimedJob("decode", 1, 192, 16),
    "a step of 4 users behind 192 tokens": TimedJob("decode", 4, 192, 16),
    "a step of 4 users behind 2,080 tokens": TimedJob("decode", 4, 2080, 16),
}
REPEATS = 15
_WITHIN_S = 1200.0


def main() -> None:
    """Make the models, time them, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=Path, help="a child whose windows are tried, and which is timed itself")
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    parent = Checkpoint.open(example() / "parent")
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for name, model in models(parent, given.child, Path(folder)).items():
            bundles[name] = Path(folder) / f"bundle of {name}"
            write_bundle(model, bundles[name], tiny_cpu().export_engine)
        steps = time_steps(list(bundles.values()), list(JOBS.values()), REPEATS, Path(folder), _WITHIN_S)
    times = dict(zip(bundles, steps.times_ms, strict=True))
    found = {"engine": steps.engine, "steps": {name: describe(times, index) for index, name in enumerate(JOBS)}}
    conclude(" ".join(["python benchmarks/short_context.py", *sys.argv[1:]]), (), found, given.record)


def models(parent: Checkpoint, child: Path | None, directory: Path) -> dict[str, Checkpoint]:
    """The parent, its changes, and the child if one is given."""
    own = parent.architecture.blocks
    changed: dict[str, Sequence[Block]] = {
        "half the experts": [replace(block, num_experts=block.num_experts // 2) for block in own],
        "half the width": [replace(block, expert_width=block.expert_width // 2) for block in own],
        "one expert per token": [replace(block, experts_per_token=1) for block in own],
        "one layer": own[:1],
    }
    found = {"parent": parent}
    if child is not None:
        found["child"] = Checkpoint.open(child)
        windows = [block.window for block in found["child"].architecture.blocks]
        changed["the child's windows"] = [
            replace(block, window=window) for block, window in zip(own, windows, strict=True)
        ]
    return found | {name: _write(parent, blocks, directory / name) for name, blocks in changed.items()}


def _write(parent: Checkpoint, blocks: Sequence[Block], directory: Path) -> Checkpoint:
    """The parent with other blocks, which keep the experts and channels of the lowest ids."""

    def shards() -> Iterator[tuple[str, Mapping[str, Tensor | StoredTensor]]]:
        yield "model-outer", {name: parent.stored(name) for name in layout.outer_specs(parent.shape)}
        for layer, (block, own) in enumerate(zip(blocks, parent.architecture.blocks, strict=False)):
            tensors = {name: parent.stored(name) for name in parent.layer_names(layer)}
            narrower = block.expert_width < own.expert_width
            first = torch.arange(block.expert_width).expand(block.num_experts, -1) if narrower else None
            yield from layer_shards(layer, prune_stored(tensors, range(block.num_experts), first)[0])

    write_checkpoint(directory, layout.child_config(parent.config, Architecture.of(blocks)), shards())
    return Checkpoint.open(directory)


def describe(times: Mapping[str, Sequence[Sequence[float]]], job: int) -> dict[str, Any]:
    """By model its milliseconds, and how much faster it is than the parent, repeat by repeat."""
    reference = times["parent"][job]
    found = {}
    for name, of_model in times.items():
        ratios = [theirs / own for theirs, own in zip(reference, of_model[job], strict=True)]
        quartiles = sorted(ratios)[len(ratios) // 4], sorted(ratios)[-1 - len(ratios) // 4]
        found[name] = {"ms": median(of_model[job]), "times_faster": median(ratios), "half_of_repeats": list(quartiles)}
    return found


if __name__ == "__main__":
    main()

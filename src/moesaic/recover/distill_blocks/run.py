"""Block-wise local distillation: every block that was changed learns, alone, what its parent's block returns.

A block that did not come closer on held-out sequences is handed on as it was: what lies outside its window, say,
cannot be learned back, and what it learns instead is noise.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.core.progress import track
from moesaic.core.training_curve import CURVE
from moesaic.data.batches import Batch
from moesaic.models import layout, loading
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.layers import run_block
from moesaic.recover.distill_blocks.nemo import BlockJob, BlockResult, check_installed, train_blocks
from moesaic.recover.distill_blocks.nemo.jobs import HELD_OUT, LEARNED, MASKS, batch_name, boundary_file, save_tensors
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig
from moesaic.recover.layerwise import changed_layers, read_batches

Batches = dict[str, Batch]
"""By name; the name says whether a batch is learned from or held out."""


def run(
    config: DistillBlocksConfig, *, child: Path, parent: Path, calibration: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write the child with its changed blocks retrained, and ``training.jsonl``: a row per layer and step.

    ``scratch`` holds two sets of hidden states for every run of changed layers, and one more for each layer of it.
    """
    student, teacher = Checkpoint.open(child), Checkpoint.open(parent)
    layers = changed_layers(student, teacher) if config.steps else []
    jobs = [_make_job(config, student, layer, scratch) for layer in layers]
    if jobs:
        check_installed()
        batches = _read_batches(config, teacher, calibration)
        _save_states(config, teacher, batches, layers, scratch)
        train_blocks(jobs, config.layers_in_parallel, scratch)
    results = {job.layer: BlockResult.load(job.directory) for job in jobs}
    better = {layer: result for layer, result in results.items() if result.is_better}
    training = scratch / CURVE
    training.write_text("".join(json.dumps(row) + "\n" for layer in layers for row in _rows(layer, results[layer])))
    rewrite_checkpoint(
        student,
        output,
        {name: tensor for result in better.values() for name, tensor in result.tensors.items()},
        {"stage": "distill_blocks", "steps": config.steps, "layers": list(better)},
        extra=[training],
    )
    return _metrics(results)


def _make_job(config: DistillBlocksConfig, student: Checkpoint, layer: int, scratch: Path) -> BlockJob:
    names = layout.trainable_names(student.shape, student.architecture, config.trainable)
    learned = [name for name in names if name.startswith(layout.layer_prefix(layer))]
    if not learned:
        raise ConfigError(
            f"trainable is {', '.join(config.trainable) or 'empty'}, and no weight of a block belongs to that; "
            "choose among attention, norms and router"
        )
    directory = scratch / f"layer-{layer:03d}"
    return BlockJob(layer, student.directory.absolute(), scratch.absolute(), directory, tuple(learned), config)


def _read_batches(config: DistillBlocksConfig, teacher: Checkpoint, calibration: Path) -> Batches:
    """Batches to learn from, and batches of the sequences that are held out."""
    learned, held_out = read_batches(calibration, teacher, config.max_sequences, config.max_tokens, config.batch_tokens)
    return {
        batch_name(part, index): batch
        for part, batches in ((LEARNED, learned), (HELD_OUT, held_out))
        for index, batch in enumerate(batches)
    }


@torch.no_grad()
def _save_states(
    config: DistillBlocksConfig, teacher: Checkpoint, batches: Batches, layers: Sequence[int], scratch: Path
) -> None:
    """Stream the parent's layers and keep the hidden states at every boundary of a changed block.

    Goes on behind the last boundary that is on disk.
    """
    needed = sorted({boundary for layer in layers for boundary in (layer, layer + 1)})
    missing = [boundary for boundary in needed if not boundary_file(scratch, boundary).is_file()]
    if not missing:
        return
    dtype, device = getattr(torch, config.precision), loading.choose_device()
    save_tensors(scratch / MASKS, {name: batch.is_token for name, batch in batches.items()})
    rotary = loading.rotary(teacher, max(batch.num_positions for batch in batches.values()), dtype, device)
    first = max((boundary for boundary in needed if boundary < missing[0]), default=0)
    states = _load_states(teacher, batches, boundary_file(scratch, first), dtype)
    if first in missing:
        save_tensors(boundary_file(scratch, first), states)
    for layer in track(range(first, needed[-1]), needed[-1] - first, "the parent's hidden states, layers"):
        module = loading.load_block(teacher, layer, dtype, device)
        window = teacher.architecture.blocks[layer].window
        for name, hidden in states.items():
            states[name] = run_block(module, hidden.to(device), rotary, window).cpu()
        if layer + 1 in needed:
            save_tensors(boundary_file(scratch, layer + 1), states)


def _load_states(teacher: Checkpoint, batches: Batches, boundary: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A boundary from disk, or what enters the first layer."""
    if boundary.is_file():
        states: dict[str, Tensor] = load_file(boundary)
        return states
    embedded = loading.embed(teacher, [batch.token_ids for batch in batches.values()], dtype)
    return dict(zip(batches, embedded, strict=True))


def _rows(layer: int, result: BlockResult) -> list[dict[str, float]]:
    last = len(result.losses)
    return [
        {"layer": layer, "step": 0, "held_out_loss": result.held_out_before},
        *({"layer": layer, "step": step, "loss": loss} for step, loss in enumerate(result.losses, 1)),
        {"layer": layer, "step": last, "held_out_loss": result.held_out_after},
    ]


def _metrics(results: Mapping[int, BlockResult]) -> dict[str, float]:
    """Per layer what training gave; the mean afterwards is of the blocks as they are handed on."""
    better = sum(result.is_better for result in results.values())
    metrics = {"num_blocks": float(len(results)), "num_blocks_better": float(better)}
    if results:
        metrics["held_out_loss_before"] = fmean(result.held_out_before for result in results.values())
        handed_on = [min(result.held_out_before, result.held_out_after) for result in results.values()]
        metrics["held_out_loss_after"] = fmean(handed_on)
    for layer, result in results.items():
        metrics[f"held_out_loss_before_layer_{layer:03d}"] = result.held_out_before
        metrics[f"held_out_loss_after_layer_{layer:03d}"] = result.held_out_after
    return metrics

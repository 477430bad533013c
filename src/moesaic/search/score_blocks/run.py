"""Score every variant of every block by putting it in the parent's place."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import ConfigError
from moesaic.core.files import write_text_atomically
from moesaic.core.process_group import BatchShare, share
from moesaic.core.progress import count_steps
from moesaic.models.architecture import Block
from moesaic.models.channel_orders import read_channels
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import check_finite
from moesaic.models.stage_outputs import read_orders
from moesaic.search.library import check_storable, variants_of
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.prune_model.pruning import kept_channels, kept_experts
from moesaic.search.score_blocks.scoring import (
    Measurement,
    Offloaded,
    OnSteps,
    Parent,
    Variant,
    advance,
    check_identity,
    num_steps,
    run_parent,
    score_layer,
    total,
)
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.space import SearchSpace

Row = dict[str, Any]
_INPUTS = ("parent", "ranking", "calibration_short", "calibration_long")


@dataclass(frozen=True)
class _Job:
    """Everything that scoring needs, read and checked."""

    config: ScoreBlocksConfig
    checkpoint: Checkpoint
    variants: Sequence[Sequence[Variant]]
    """By layer, the parent's own block first."""
    probes: Probes

    @property
    def num_steps(self) -> int:
        """Block forwards: those of the variants, and the parent's."""
        return num_steps([len(layer) for layer in self.variants]) + 2 * self.checkpoint.num_layers


def run(
    config: ScoreBlocksConfig,
    *,
    parent: Path,
    ranking: Path,
    calibration_short: Path,
    calibration_long: Path,
    output: Path,
    scratch: Path,
) -> dict[str, float]:
    """Write ``scores.json``: a row per layer and variant. Layers that ``scratch`` holds are not scored again."""
    inputs = dict(zip(_INPUTS, (parent, ranking, calibration_short, calibration_long), strict=True))
    job = _prepare(config, **inputs)
    if not all(_finished(job, scratch)) and not share(config, inputs, scratch, len(job.probes.all)):
        _run_through(job, scratch, BatchShare())
    layers = range(job.checkpoint.num_layers)
    rows = [row for layer in layers for row in json.loads(_saved(scratch, layer).read_text())]
    content = {
        "metric": config.metric,
        "balance": config.balance,
        "long_weight": config.long_weight,
        "parent": [block.as_config() for block in job.checkpoint.architecture.blocks],
        "rows": rows,
    }
    (output / "scores.json").write_text(json.dumps(content, indent=1) + "\n")
    return {
        "num_rows": float(len(rows)),
        "short_tokens": float(sum(int(probe.measured.sum()) for probe in job.probes.short)),
        "long_tokens": float(sum(int(probe.measured.sum()) for probe in job.probes.long)),
        "block_forwards": float(job.num_steps),
        "block_forwards_naive": float((len(rows) + 1) * len(layers)),
    }


def work(
    config: ScoreBlocksConfig,
    *,
    parent: Path,
    ranking: Path,
    calibration_short: Path,
    calibration_long: Path,
    scratch: Path,
    batch_share: BatchShare,
) -> None:
    """Take part in scoring, as one of several processes."""
    _run_through(_prepare(config, parent, ranking, calibration_short, calibration_long), scratch, batch_share)


def choose_variants(offers: Sequence[Sequence[Block]], checkpoint: Checkpoint, ranking: Path) -> list[list[Variant]]:
    """Every layer's variants, with the ids of the parent's experts that each keeps, and of their channels.

    Args:
        offers: by layer.
        checkpoint: the parent.
        ranking: the folder that ``rank_experts`` wrote.
    """
    parent = checkpoint.architecture
    orders = read_orders(ranking / "ranking.json", parent)
    widths = [
        {block.expert_width for block in offer} - {own.expert_width}
        for offer, own in zip(offers, parent.blocks, strict=True)
    ]
    channels = read_channels(ranking, parent) if any(widths) else []
    narrower = [
        {width: kept_channels(channels[layer], width) for width in offered} for layer, offered in enumerate(widths)
    ]
    return [
        [Variant(block, kept_experts(order, block.num_experts), kept.get(block.expert_width)) for block in offer]
        for offer, order, kept in zip(offers, orders, narrower, strict=True)
    ]


def offers_of(space: SearchSpace, checkpoint: Checkpoint) -> list[tuple[Block, ...]]:
    """What each layer of the parent may be replaced by.

    Raises:
        ConfigError: if the space does not fit the parent.
    """
    for window in space.windows:
        if window >= checkpoint.shape.max_positions:
            raise ConfigError(
                f"window {window} is not smaller than the parent's context of {checkpoint.shape.max_positions} tokens; "
                "a window that covers everything is full attention, which is always on offer"
            )
    check_storable(space, checkpoint.packed)
    return [variants_of(own, space) for own in checkpoint.architecture.blocks]


def _prepare(
    config: ScoreBlocksConfig, parent: Path, ranking: Path, calibration_short: Path, calibration_long: Path
) -> _Job:
    """Read and check everything but weights."""
    checkpoint = Checkpoint.open(parent)
    variants = choose_variants(offers_of(config.space, checkpoint), checkpoint, ranking)
    windows = config.space.windows if any(block.window is None for block in checkpoint.architecture.blocks) else ()
    probes = Probes.read(
        config, checkpoint, calibration_short, calibration_long, windows, at_once=config.variants_per_batch
    )
    return _Job(config, checkpoint, variants, probes)


def _run_through(job: _Job, scratch: Path, batch_share: BatchShare) -> None:
    """Score this process's share of the batches; the first process saves and shows how far all are."""
    shown = count_steps(job.num_steps, "scoring blocks") if batch_share.rank == 0 else nullcontext(lambda _: None)
    with open_parent(job.config, job.checkpoint, job.probes, scratch, batch_share) as parent, shown as on_steps:
        _score(job, parent, scratch, batch_share, on_steps)


def _score(job: _Job, parent: Parent, scratch: Path, batch_share: BatchShare, on_steps: OnSteps) -> None:
    """Score layer after layer and save each."""
    finished, probes = _finished(job, scratch), batch_share.mine(job.probes.all)
    measurements = run_parent(parent, embed(job.config, job.checkpoint, parent, probes), probes, on_steps)
    states = embed(job.config, job.checkpoint, parent, probes)
    for layer, variants in enumerate(job.variants):
        if finished[layer]:
            on_steps(len(variants) * (len(job.variants) - layer))
        else:
            rows = _score_layer(job, parent, layer, states, measurements, batch_share, on_steps)
            if batch_share.rank == 0:
                write_text_atomically(_saved(scratch, layer), json.dumps(rows) + "\n")
        if layer < parent.last:
            states = advance(parent, layer, states)
        on_steps(1)


def _score_layer(
    job: _Job,
    parent: Parent,
    layer: int,
    states: list[Offloaded],
    measurements: list[Measurement],
    batch_share: BatchShare,
    on_steps: OnSteps,
) -> list[Row]:
    """The rows of one layer, from the sums of all processes."""
    variants, size = job.variants[layer], job.config.variants_per_batch
    mine = score_layer(parent, layer, states, measurements, variants, size, on_steps, prove=batch_share.rank == 0)
    batches = batch_share.gather([torch.stack(parts) for parts in zip(*mine, strict=True)])
    sums = [[batch[index] for batch in batches] for index in range(len(variants))]
    scores = [(total(parts[: len(job.probes.short)]), total(parts[len(job.probes.short) :])) for parts in sums]
    for variant, parts in zip(variants, sums, strict=True):
        check_finite(layer, f"the sums of {variant.block.label}", torch.stack(parts))
    check_identity(layer, scores[0][0])
    metric, weight = job.config.metric, job.config.long_weight
    return [
        {
            "layer": layer,
            **variant.block.as_config(),
            "damage": short[metric] + weight * long[metric],
            "short": short,
            "long": long,
        }
        for variant, (short, long) in zip(variants, scores, strict=True)
    ]


def _finished(job: _Job, scratch: Path) -> list[bool]:
    """Of every layer, whether an earlier run has scored it."""
    return [_saved(scratch, layer).is_file() for layer in range(job.checkpoint.num_layers)]


def _saved(scratch: Path, layer: int) -> Path:
    return scratch / f"layer-{layer:03d}.json"

"""Score every variant of every block by putting it in the parent's place."""

import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from moesaic import blocks
from moesaic.calibration import load_batches
from moesaic.checkpoint import Checkpoint
from moesaic.configs import ScoreBlocksConfig, SearchSpace
from moesaic.errors import ArtifactError, ConfigError
from moesaic.library import variants_of
from moesaic.progress import track
from moesaic.pruning import kept_experts
from moesaic.scoring import (
    Measurement,
    Parent,
    Probe,
    Variant,
    advance,
    check_identity,
    check_masking,
    num_steps,
    run_parent,
    score_layer,
    total,
)
from moesaic.stages.payloads import read_orders

Row = dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """Everything that scoring needs, read and checked."""

    config: ScoreBlocksConfig
    checkpoint: Checkpoint
    parent: Parent
    variants: Sequence[Sequence[Variant]]
    """By layer, the parent's own block first."""
    short: Sequence[Probe]
    long: Sequence[Probe]
    dtype: torch.dtype

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
    checkpoint = Checkpoint.open(parent)
    variants = _choose_variants(config.space, checkpoint, ranking / "ranking.json")
    job = _prepare(config, checkpoint, variants, calibration_short, calibration_long)
    if any(not _saved(scratch, layer).is_file() for layer in range(checkpoint.num_layers)):
        for _ in track(_score(job, scratch), job.num_steps, "scoring blocks"):
            pass
    rows = [row for layer in range(checkpoint.num_layers) for row in json.loads(_saved(scratch, layer).read_text())]
    content = {
        "metric": config.metric,
        "long_weight": config.long_weight,
        "parent": [block.as_config() for block in checkpoint.architecture.blocks],
        "rows": rows,
    }
    (output / "scores.json").write_text(json.dumps(content, indent=1) + "\n")
    return {
        "num_rows": float(len(rows)),
        "short_tokens": float(sum(int(probe.measured.sum()) for probe in job.short)),
        "long_tokens": float(sum(int(probe.measured.sum()) for probe in job.long)),
        "block_forwards": float(job.num_steps),
        "block_forwards_naive": float((len(rows) + 1) * checkpoint.num_layers),
    }


def _choose_variants(space: SearchSpace, checkpoint: Checkpoint, ranking: Path) -> list[list[Variant]]:
    most = max(block.num_experts for block in checkpoint.architecture.blocks)
    if max(space.expert_counts, default=0) > most:
        raise ConfigError(f"expert count {max(space.expert_counts)} is more than the parent's; offer at most {most}")
    for window in space.windows:
        if window >= checkpoint.shape.max_positions:
            raise ConfigError(
                f"window {window} is not smaller than the parent's context of {checkpoint.shape.max_positions} tokens; "
                "a window that covers everything is full attention, which is always on offer"
            )
    orders = read_orders(ranking, checkpoint.architecture)
    offers = [variants_of(own, space, checkpoint.shape.experts_per_token) for own in checkpoint.architecture.blocks]
    return [
        [Variant(block, kept_experts(order, block.num_experts)) for block in offer]
        for offer, order in zip(offers, orders, strict=True)
    ]


def _prepare(
    config: ScoreBlocksConfig, checkpoint: Checkpoint, variants: list[list[Variant]], short: Path, long: Path
) -> _Job:
    windows = config.space.windows if any(block.window is None for block in checkpoint.architecture.blocks) else ()
    short_probes = _probes(config, checkpoint, short, first=0)
    long_probes = _probes(config, checkpoint, long, first=min(windows, default=0))
    furthest = max(int(probe.measured.any(0).nonzero().max()) for probe in long_probes)
    if max(windows, default=0) > furthest:
        raise ArtifactError(
            f"{long}: its last response token is at position {furthest}, where a window of {max(windows)} "
            "cannot do harm and would score 0; use longer sequences (max_tokens cuts them) or smaller windows"
        )
    dtype, device = getattr(torch, config.precision), blocks.choose_device()
    longest = max(probe.batch.num_positions for probe in (*short_probes, *long_probes))
    parent = Parent(
        checkpoint.architecture,
        lambda layer: blocks.load_block(checkpoint, layer, dtype, device),
        blocks.load_head(checkpoint, dtype, device),
        blocks.rotary(checkpoint, longest, dtype, device),
    )
    return _Job(config, checkpoint, parent, variants, short_probes, long_probes, dtype)


def _probes(config: ScoreBlocksConfig, checkpoint: Checkpoint, data: Path, first: int) -> list[Probe]:
    """The batches of a set that have something to measure; variants together fill ``batch_tokens``."""
    batches = load_batches(
        data,
        checkpoint.directory,
        max_sequences=config.max_sequences,
        max_tokens=min(config.max_tokens, checkpoint.shape.max_positions),
        batch_tokens=config.batch_tokens // config.variants_per_batch,
    )
    probes = [probe for probe in (Probe.of(batch, first) for batch in batches) if probe.measured.any()]
    if not probes:
        longest = max(batch.num_positions for batch in batches)
        raise ArtifactError(
            f"{data} has no response token at or beyond position {first} (its longest sequence has {longest} tokens); "
            "use longer conversations that end in an assistant's turn, or smaller windows"
        )
    return probes


def _score(job: _Job, scratch: Path) -> Generator[None, None, None]:
    """Score layer after layer, saving each; yields once per block forward."""
    probes = [*job.short, *job.long]
    states = blocks.embed(job.checkpoint, [probe.batch.token_ids for probe in probes], job.dtype)
    measurements = yield from run_parent(job.parent, states, probes)
    for layer in range(job.checkpoint.num_layers):
        module = job.parent.load(layer)
        if _saved(scratch, layer).is_file():
            yield from [None] * (len(job.variants[layer]) * (job.checkpoint.num_layers - layer))
        else:
            rows = yield from _score_layer(job, module, layer, states, measurements)
            _save(_saved(scratch, layer), rows)
        states = advance(job.parent, module, layer, states)
        yield


def _score_layer(
    job: _Job, module: GptOssDecoderLayer, layer: int, states: list[Tensor], measurements: list[Measurement]
) -> Generator[None, None, list[Row]]:
    variants = job.variants[layer]
    for kept in {variant.kept for variant in variants}:
        check_masking(layer, module, states[0], kept)
    sums = yield from score_layer(
        job.parent, module, layer, states, measurements, variants, job.config.variants_per_batch
    )
    scores = [(total(parts[: len(job.short)]), total(parts[len(job.short) :])) for parts in sums]
    check_identity(layer, scores[0][0])
    metric, weight = job.config.metric, job.config.long_weight
    return [
        {
            "layer": layer,
            "num_experts": variant.block.num_experts,
            "window": variant.block.window,
            "damage": short[metric] + weight * long[metric],
            "short": short,
            "long": long,
        }
        for variant, (short, long) in zip(variants, scores, strict=True)
    ]


def _saved(scratch: Path, layer: int) -> Path:
    return scratch / f"layer-{layer:03d}.json"


def _save(path: Path, rows: list[Row]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows) + "\n")
    os.replace(partial, path)

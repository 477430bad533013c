"""Rank the experts of every layer in one streaming pass over the short calibration set."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from moesaic import blocks
from moesaic.calibration import Batch, load_batches
from moesaic.checkpoint import Checkpoint
from moesaic.configs import RankExpertsConfig
from moesaic.progress import track
from moesaic.ranking import NUM_SPARE, LayerRanking, rank_layer, rank_randomly


def run(
    config: RankExpertsConfig, *, parent: Path, calibration_short: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write ``ranking.json``: per layer the experts in order of importance, and their scores by id."""
    checkpoint = Checkpoint.open(parent)
    batches = load_batches(
        calibration_short,
        parent,
        max_sequences=config.max_sequences,
        max_tokens=min(config.max_tokens, checkpoint.shape.max_positions),
        batch_tokens=config.batch_tokens,
    )
    num_tokens = sum(int(batch.is_token.sum()) for batch in batches)
    if config.criterion == "random":
        experts = [block.num_experts for block in checkpoint.architecture.blocks]
        layers = [rank_randomly(count, config.seed + layer) for layer, count in enumerate(experts)]
    else:
        layers = list(_rank(config, checkpoint, batches))
    content = {"criterion": config.criterion, "num_tokens": num_tokens, "layers": [asdict(layer) for layer in layers]}
    (output / "ranking.json").write_text(json.dumps(content, indent=1) + "\n")
    return {"num_tokens": float(num_tokens), "num_layers": float(len(layers))}


def _rank(config: RankExpertsConfig, checkpoint: Checkpoint, batches: list[Batch]) -> Iterator[LayerRanking]:
    dtype, device = getattr(torch, config.precision), blocks.choose_device()
    states = blocks.embed(checkpoint, [batch.token_ids for batch in batches], dtype)
    turns = blocks.rotary(checkpoint, max(batch.num_positions for batch in batches), dtype, device)
    for layer in track(range(checkpoint.num_layers), checkpoint.num_layers, "ranking layers"):
        module = blocks.load_block(checkpoint, layer, dtype, device)
        window = checkpoint.architecture.blocks[layer].window
        num_spare = NUM_SPARE.get(config.criterion, 0)
        routings = _route_all(module, states, batches, turns, window, num_spare)
        yield rank_layer(config.criterion, routings, checkpoint.architecture.blocks[layer].num_experts)


def _route_all(
    module: GptOssDecoderLayer,
    states: list[Tensor],
    batches: list[Batch],
    turns: blocks.Rotary,
    window: int | None,
    num_spare: int,
) -> Iterator[blocks.Routing]:
    """Route every batch's tokens, padding left out, and take its states in ``states`` on to the next layer."""
    device = module.self_attn.sinks.device
    for index, batch in enumerate(batches):
        attended = blocks.attend(module, states[index].to(device), turns, window)
        is_token = batch.is_token.to(device)
        routing = blocks.route(module, module.post_attention_layernorm(attended[is_token]), num_spare)
        attended[is_token] += routing.mixture()
        states[index] = attended.cpu()
        yield routing

"""Children of tiny parents of any family: cut as ``prune_model`` cuts them, and run one layer at a time."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.models import layers, loading
from moesaic.models.architecture import Architecture
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig

ORDER = [3, 1, 7, 0, 2, 6, 5, 4]
"""Of the eight experts of every layer that has any."""
CHANNELS = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(expert)) for expert in range(8)])


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(6, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def kept(architecture: Architecture) -> list[list[int]]:
    """By layer the experts that are kept."""
    return [sorted(ORDER[: block.num_experts]) for block in architecture.blocks]


def prune(parent: Path, architecture: Architecture, directory: Path, yarn_factor: float | None = None) -> Path:
    for name in ("ranking", "architecture", "child", "scratch"):
        (directory / name).mkdir(parents=True)
    sizes = [(block.num_experts, block.expert_width) for block in Checkpoint.open(parent).architecture.blocks]
    orders = [{"order": ORDER[:experts]} for experts, _ in sizes]
    (directory / "ranking" / "ranking.json").write_text(json.dumps({"layers": orders}))
    channels = {str(layer): CHANNELS[:experts, :width].clone() for layer, (experts, width) in enumerate(sizes)}
    save_file(channels, directory / "ranking" / "channels.safetensors")
    blocks = [block.as_config() for block in architecture.blocks]
    candidates = {"candidates": {"puzzle": {"blocks": blocks}}}
    (directory / "architecture" / "architecture.json").write_text(json.dumps(candidates))
    config = PruneModelConfig(yarn_factor=yarn_factor)
    inputs = {name: directory / name for name in ("ranking", "architecture", "scratch")}
    prune_model.run(config, parent=parent, output=directory / "child", **inputs)
    return directory / "child"


def stream(checkpoint: Checkpoint, ids: Tensor, blocks: Architecture, masked: bool = False) -> Tensor:
    """Logits, one layer in memory at a time; ``masked``: of a parent without what these blocks leave out."""
    (hidden,) = loading.embed(checkpoint, [ids])
    rotary = loading.rotary(checkpoint, ids.shape[1])
    for layer, block in enumerate(blocks.blocks):
        module = loading.load_block(checkpoint, layer)
        narrower = masked and block.expert_width < checkpoint.architecture.blocks[layer].expert_width
        channels = CHANNELS[:, : block.expert_width].sort(-1).values if narrower else None
        mine = kept(blocks)[layer] if masked else None
        hidden = layers.run_block(module, hidden, rotary, block.window, mine, block.experts_per_token, channels)
    head = loading.load_head(checkpoint)
    return head.logits(head.norm(hidden))

"""Assemble a child checkpoint from its parent, a ranking and an architecture.

It is made of ranges of the parent's files, copied; narrower experts alone go through memory, a layer at a time.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.core.progress import track
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block, ExpertOrder
from moesaic.models.channel_orders import read_channels
from moesaic.models.checkpoint import Checkpoint, layer_shards, modelling_files, write_checkpoint
from moesaic.models.checkpoint_layout import companions
from moesaic.models.safetensors_files import StoredTensor
from moesaic.models.stage_outputs import read_json, read_orders
from moesaic.search.prune_model.pruning import kept_channels, kept_experts, prune_stored
from moesaic.search.prune_model.stage import PruneModelConfig

PRUNING = "pruning.json"
"""The file in a child checkpoint that names the candidate and, per layer, the parent's experts it kept."""

_COMPANIONS = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab*",
    "merges.txt",
)


def run(
    config: PruneModelConfig, *, parent: Path, ranking: Path, architecture: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write the child checkpoint into ``output``; nothing of it is visible before it is whole."""
    whole = Checkpoint.open(parent)
    whole.check_prunable()
    child, keeps = _read_candidate(architecture / "architecture.json", config.candidate)
    child.check_child_of(whole.architecture)
    orders = read_orders(ranking / "ranking.json", whole.architecture, keeps)
    kept = [kept_experts(order, block.num_experts) for order, block in zip(orders, child.blocks, strict=True)]
    pruning = scratch / PRUNING
    pruning.write_text(json.dumps({"candidate": config.candidate, "kept_experts": kept}) + "\n")
    channels = _channels(ranking, whole.architecture, child, kept)
    lost: list[float] = []
    kept_files = [path for path in companions(parent) if any(path.match(pattern) for pattern in _COMPANIONS)]
    write_checkpoint(
        output,
        layout.child_config(whole.config, child, config.yarn_factor),
        _shards(whole, kept, channels, lost),
        [*kept_files, *modelling_files(whole.shape.family), pruning],
    )
    written = Checkpoint.open(output)
    return {
        "parameters": float(layout.num_parameters(written.shape, written.architecture)),
        "parameters_ratio": layout.num_parameters(written.shape, child)
        / layout.num_parameters(whole.shape, whole.architecture),
        "experts_ratio": child.num_experts / whole.architecture.num_experts,
        "checkpoint_ratio": layout.num_bytes(written.shape, child, written.packed)
        / layout.num_bytes(whole.shape, whole.architecture, whole.packed),
        "repacking_error": max(lost),
    }


def _read_candidate(path: Path, name: str) -> tuple[Architecture, ExpertOrder]:
    """The blocks of a candidate, and the order of experts that it is cut by."""
    content = read_json(path)
    if name not in content["candidates"]:
        reason = content.get("skipped", {}).get(name)
        allowed = ", ".join(content["candidates"])
        raise ConfigError(
            f"candidate {name!r} is not in {path.name} ({reason or 'unknown name'}); choose one of {allowed}"
        )
    candidate = content["candidates"][name]
    return Architecture.of(Block.from_config(entry) for entry in candidate["blocks"]), candidate.get("keeps", "order")


def _channels(
    ranking: Path, parent: Architecture, child: Architecture, kept: Sequence[Sequence[int]]
) -> list[Int[Tensor, "expert kept_channel"] | None]:
    """By layer the channels of the experts that are kept; None where these stay whole."""
    narrower = [new.expert_width < own.expert_width for new, own in zip(child.blocks, parent.blocks, strict=True)]
    orders = read_channels(ranking, parent) if any(narrower) else []
    return [
        kept_channels(orders[layer][list(kept[layer])], block.expert_width) if narrower[layer] else None
        for layer, block in enumerate(child.blocks)
    ]


def _shards(
    parent: Checkpoint,
    kept: Sequence[Sequence[int]],
    channels: Sequence[Int[Tensor, "expert kept_channel"] | None],
    lost: list[float],
) -> Iterator[tuple[str, Mapping[str, Tensor | StoredTensor]]]:
    """Every shard of the child; what packing narrower experts anew loses is appended to ``lost``, by layer."""
    yield "model-outer", {name: parent.stored(name) for name in layout.outer_specs(parent.shape)}
    for layer in track(range(parent.num_layers), parent.num_layers, "pruning layers"):
        tensors = {name: parent.stored(name) for name in parent.layer_names(layer)}
        pruned, error = prune_stored(tensors, kept[layer], channels[layer])
        lost.append(error)
        yield from layer_shards(layer, pruned)

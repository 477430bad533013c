"""Rank the experts of every layer, and their channels, in one streaming pass over the short calibration set.

A killed pass goes on from ``scratch``, where it keeps every five minutes what it has done.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.process_group import BatchShare, share
from moesaic.core.progress import track
from moesaic.data.batches import Batch
from moesaic.data.calibration import load_batches
from moesaic.models import layers, loading
from moesaic.models.channel_orders import CHANNELS
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import DecoderLayer, down_norms, is_dense
from moesaic.models.streaming import LayerReader, OffloadedTensor, StateOffloader, state_memory_bytes
from moesaic.search.rank_experts.channels import order_channels
from moesaic.search.rank_experts.ranking import LayerRanking, Tally, rank_randomly, rank_tallies, tally
from moesaic.search.rank_experts.saved_progress import RankingProgress
from moesaic.search.rank_experts.stage import NUM_SPARE, Criterion, RankExpertsConfig

_SHARED = "layers.json"
"""The ranking that several processes made together, in scratch."""


def run(
    config: RankExpertsConfig, *, parent: Path, calibration_short: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write ``ranking.json``, per layer the experts in order of importance and their scores by id, and the channels.

    Beside its own order a layer has that of the criterion ``reap``.
    """
    checkpoint = Checkpoint.open(parent)
    batches = _load_batches(config, checkpoint, calibration_short)
    num_tokens = sum(int(batch.is_token.sum()) for batch in batches)
    if share(config, {"parent": parent, "calibration_short": calibration_short}, scratch, len(batches)):
        layers = [LayerRanking.from_json(layer) for layer in json.loads((scratch / _SHARED).read_text())]
    else:
        layers = list(_rank(config, checkpoint, batches, scratch, BatchShare()))
    content = {
        "criterion": config.criterion,
        "channel_criterion": config.channel_criterion,
        "num_tokens": num_tokens,
        "layers": [{"order": layer.order, "scores": layer.scores, "reap": layer.reap} for layer in layers],
    }
    (output / "ranking.json").write_text(json.dumps(content, indent=1) + "\n")
    channels = {str(index): layer.channels for index, layer in enumerate(layers) if layer.channels is not None}
    save_file(channels, output / CHANNELS)
    return {"num_tokens": float(num_tokens), "num_layers": float(len(layers))}


def work(
    config: RankExpertsConfig, *, parent: Path, calibration_short: Path, scratch: Path, batch_share: BatchShare
) -> None:
    """Take part in ranking, as one of several processes; the first one saves."""
    checkpoint = Checkpoint.open(parent)
    layers = list(_rank(config, checkpoint, _load_batches(config, checkpoint, calibration_short), scratch, batch_share))
    if batch_share.rank == 0:
        (scratch / _SHARED).write_text(json.dumps([layer.as_json() for layer in layers]) + "\n")


def _load_batches(config: RankExpertsConfig, checkpoint: Checkpoint, data: Path) -> list[Batch]:
    return load_batches(
        data,
        checkpoint.directory,
        max_sequences=config.max_sequences,
        max_tokens=min(config.max_tokens, checkpoint.shape.max_positions),
        batch_tokens=config.batch_tokens,
    )


def _rank(
    config: RankExpertsConfig, checkpoint: Checkpoint, batches: list[Batch], scratch: Path, batch_share: BatchShare
) -> Iterator[LayerRanking]:
    """Rank layer after layer from all processes' batches, of which this one takes its share; go on after a kill."""
    dtype, device = getattr(torch, config.precision), loading.choose_device()
    rotary = loading.rotary(checkpoint, max(batch.num_positions for batch in batches), dtype, device)
    mine = batch_share.mine(batches)
    offloader = StateOffloader(state_memory_bytes(batch_share.count), scratch / f"states-{batch_share.rank}", device)
    progress = RankingProgress(scratch, batch_share)
    done = progress.layers()
    embedded = loading.embed_each(checkpoint, [batch.token_ids for batch in mine], dtype)
    states = [offloader.offload(hidden) for hidden in (progress.states(len(done)) if done else embedded)]
    reader, layers = LayerReader(checkpoint, dtype, device), range(len(done), checkpoint.num_layers)
    yield from done
    try:
        for layer in track(layers, len(layers), "ranking layers") if batch_share.rank == 0 else layers:
            window = checkpoint.architecture.blocks[layer].window
            more = layer + 1 < checkpoint.num_layers
            module = reader.load(layer, then=layer + 1 if more else None)
            tallies = [
                _pass(config.criterion, layer, module, offloader, states, mine, index, rotary, window)
                for index in range(len(mine))
            ]
            norms = torch.zeros(0, 0) if is_dense(module) else down_norms(module.mlp.experts)
            del module
            done.append(_finish(config, layer, batch_share.gather(tallies), norms))
            if more:
                progress.keep(done, states)
            yield done[-1]
    finally:
        reader.close()


def _finish(
    config: RankExpertsConfig, layer: int, tallies: Sequence[Tally], norms: Float[Tensor, "expert channel"]
) -> LayerRanking:
    """The ranking of a layer, from the tallies of all batches; empty if it has no experts."""
    if not len(norms):
        return LayerRanking((), (), (), torch.zeros(0, 0, dtype=torch.int32))
    energies = torch.stack([each.energies for each in tallies]).sum(0)
    seed = config.seed + layer
    channels = order_channels(config.channel_criterion, energies, norms, seed)
    is_random = config.criterion == "random"
    ranking = rank_randomly(len(norms), seed) if is_random else rank_tallies(config.criterion, tallies)
    return replace(ranking, channels=channels, reap=rank_tallies("reap", tallies).order)


def _pass(
    criterion: Criterion,
    layer: int,
    module: DecoderLayer,
    offloader: StateOffloader,
    states: list[OffloadedTensor],
    batches: list[Batch],
    index: int,
    rotary: layers.Rotary,
    window: int | None,
) -> Tally:
    """Route a batch's tokens, padding left out, and take its states on to the next layer."""
    device = layers.device_of(module)
    attended = layers.attend(module, states[index].read().to(device, non_blocking=True), rotary, window)
    is_token = batches[index].is_token.to(device)
    if is_dense(module):
        attended, counted = layers.mix(module, attended), Tally.of_none(int(is_token.sum()))
    else:
        normed = module.post_attention_layernorm(attended[is_token])
        routing = layers.route(module, normed, NUM_SPARE.get(criterion, 0))
        layers.check_finite(layer, "the router's logits", routing.scores.log_weights)
        layers.check_finite(layer, "the experts' outputs", routing.outputs)
        counted = tally(criterion, routing)
        attended[is_token] += layers.with_shared(module, normed, routing.mixture())
    states[index].drop()
    states[index] = offloader.offload(attended)
    return counted

"""Memory of ranking, scoring and refinement on the device that computes, simulated; see ``models.simulated_memory``.

Each runs two layers of the parent, one with and one without a window where it has both, on the largest batch there can
be, with every token measured. States of other batches are kept elsewhere. Of next-token distributions, which are
compared a few tokens at a time, the first two chunks are; the check of masking, on 512 tokens, is left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from moesaic.data.batches import Batch
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape
from moesaic.models.layout import COMPARED_LOGITS
from moesaic.models.peak import Peak
from moesaic.models.simulated_memory import Elsewhere, SimulatedLayers, peak_of, rows_of_batch, without_values
from moesaic.models.streaming import StateOffloader
from moesaic.search.damage_config import DamageConfig
from moesaic.search.library import variants_of
from moesaic.search.rank_experts.run import _pass
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.refine_architecture import assemblies
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks import damage, scoring
from moesaic.search.score_blocks.scoring import Measurement, Parent, Probe, Variant, run_parent, score_layer
from moesaic.search.score_blocks.stage import ScoreBlocksConfig

_CHUNKS = 2


@cache
def ranking_peak(
    config: RankExpertsConfig, shape: ModelShape, parent: Architecture, packed: bool, on_gpu: bool
) -> Peak:
    """The most that ``rank_experts`` holds on its device, its states kept elsewhere."""
    rows, small = rows_of_batch(config.batch_tokens, config.max_tokens, config.max_sequences), _two_layers(parent)

    def run() -> None:
        loader = SimulatedLayers(shape, small, packed, config.precision, on_gpu)
        rotary, batch = loader.rotary(config.max_tokens), _batch(rows, config.max_tokens)
        offloader = cast(StateOffloader, _Offloader())
        for layer, block in enumerate(small.blocks):
            states: list[Any] = [Elsewhere(loader.states(rows, config.max_tokens))]
            module = loader.load(layer, then=layer)
            _pass(config.criterion, layer, module, offloader, states, [batch], 0, rotary, block.window)
            del module

    with without_values(on_gpu):
        return peak_of(run)


@cache
def scoring_peak(
    config: ScoreBlocksConfig, shape: ModelShape, parent: Architecture, packed: bool, on_gpu: bool
) -> Peak:
    """The most that ``score_blocks`` holds on its device, its states kept elsewhere."""
    small, size = _two_layers(parent), config.variants_per_batch
    offers = [variants_of(block, config.space)[: 1 + size] for block in small.blocks]
    variants = [[_kept(block, own) for block in offer] for offer, own in zip(offers, small.blocks, strict=True)]

    def score(model: Parent, states: Tensor, measurements: Sequence[Measurement]) -> None:
        for layer, offered in enumerate(variants):
            score_layer(model, layer, [Elsewhere(states)], measurements, offered, size, _ignored)

    return _damage_peak(config, size, shape, small, packed, on_gpu, score)


@cache
def refinement_peak(
    config: RefineArchitectureConfig, shape: ModelShape, parent: Architecture, packed: bool, on_gpu: bool
) -> Peak:
    """The most that ``refine_architecture`` holds on its device, its states kept elsewhere."""
    small, size = _two_layers(parent), config.assemblies_per_round
    fewer = [
        [_kept(replace(block, num_experts=block.num_experts - number), block) for block in small.blocks]
        for number in (0, 1)
    ]
    assembled = [(fewer[number % 2][0], *fewer[number // 2 % 2][1:]) for number in range(size)]

    def refine(model: Parent, states: Tensor, measurements: Sequence[Measurement]) -> None:
        assemblies.run_assemblies(model, [Elsewhere(states)], measurements, assembled, _ignored)

    return _damage_peak(config, size, shape, small, packed, on_gpu, refine)


def _damage_peak(
    config: DamageConfig,
    at_once: int,
    shape: ModelShape,
    small: Architecture,
    packed: bool,
    on_gpu: bool,
    measure: Any,
) -> Peak:
    """The larger of both calibration sets' peaks."""

    def run_on(tokens: int) -> None:
        rows = rows_of_batch(config.batch_tokens // at_once, tokens, config.max_sequences)
        loader = SimulatedLayers(shape, small, packed, config.precision, on_gpu)
        model = Parent(small, loader.load, loader.head(), loader.rotary(tokens), Elsewhere)
        probes, states = [Probe.of(_batch(rows, tokens))], loader.states(1, 1).expand(rows, tokens, -1)
        measure(model, states, run_parent(model, [Elsewhere(states)], probes, _ignored))

    longest = max(config.max_tokens, config.max_long_tokens or 0)
    with without_values(on_gpu), _first_comparisons():
        peaks = [peak_of(partial(run_on, tokens)) for tokens in {config.max_tokens, longest}]
        return max(peaks, key=lambda peak: peak.total)


def _two_layers(parent: Architecture) -> Architecture:
    """The largest layer with a window and the largest without, or twice the only kind."""
    kinds = [[block for block in parent.blocks if (block.window is None) == full] for full in (False, True)]
    found = [max(kind, key=lambda block: (block.num_experts, block.window or 0)) for kind in kinds if kind]
    return Architecture.of((found * 2)[:2])


def _batch(rows: int, tokens: int) -> Batch:
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    every = torch.ones(rows, tokens, dtype=torch.bool)
    return Batch(ids, every, every)


def _kept(block: Block, own: Block) -> Variant:
    narrower = block.expert_width < own.expert_width
    channels = torch.arange(block.expert_width).expand(own.num_experts, -1) if narrower else None
    return Variant(block, tuple(range(block.num_experts)), channels)


def _ignored(_: int) -> None:
    """Nobody watches the steps."""


class _Offloader:
    """Keeps states elsewhere."""

    def offload(self, tensor: Tensor) -> Elsewhere:
        """Keep one."""
        return Elsewhere(tensor)


@contextmanager
def _first_comparisons() -> Iterator[None]:
    def compare(head: Any, parent: Tensor, children: Tensor, next_ids: Tensor, weights: Tensor) -> Tensor:
        step = max(1, COMPARED_LOGITS // (head.weight.shape[0] * children.shape[0]))
        few = slice(0, _CHUNKS * step)
        return damage.compare(head, parent[few], children[:, few], next_ids[few], weights[few])

    with (
        patch.object(scoring, "compare", compare),
        patch.object(assemblies, "compare", compare),
        patch.object(scoring, "_check_all_masks", lambda *_: None),
    ):
        yield

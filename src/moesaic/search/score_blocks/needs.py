"""What ``score_blocks`` needs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.costs.block_costs import block_bytes, outer_bytes
from moesaic.costs.facts import (
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    attend_bytes,
    hidden_bytes,
    mix_bytes,
    model_of,
    narrowed_bytes,
)
from moesaic.costs.times import forward_ms
from moesaic.models.architecture import Architecture, Block
from moesaic.models.peak import Peak
from moesaic.search.damage_needs import MeasuredTokens, damage_memory
from moesaic.search.library import variants_of
from moesaic.search.score_blocks.stage import ScoreBlocksConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def needs(task: PipelineTask[ScoreBlocksConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Prefix reuse: a variant of layer i takes its own layer and all later ones, over both calibration sets.

    ::

        block forwards = 2 L + sum_i n_i (L - i)           n_i variants of layer i (from 0), the parent's own included
        layers read    = 3 of each + sum_i groups_i (L - i),    groups_i = max(1, ceil((n_i - 1) / variants_per_batch))
        device         = 1 layer unpacked, 1 packed, the head; variants_per_batch times a batch, in attention or in
                         the mixture, and a batch's states once more; or one variant's batch in the mixture, and a copy
                         of its narrower experts; or what comparing takes
        states         = (1 + variants_per_batch) hidden states of both sets

    Reading a layer again may find it in the page cache. Three of each: for the parent's run, for going on to the next
    layer, for the check of masking.

    Time: the parent's blocks for all of them (a variant's own block is cheaper by a little).
    """
    config = task.config
    blocks, shape = model_of(facts, inputs[0]).blocks, facts.shape
    at_once = config.variants_per_batch
    tokens = MeasuredTokens.of(config, at_once)
    counts = [len(variants_of(block, config.space)) for block in blocks]
    uses = [2 + sum(counts[: layer + 1]) for layer in range(len(blocks))]
    groups = [max(1, math.ceil((count - 1) / at_once)) for count in counts]
    loads = [3 + sum(groups[: layer + 1]) for layer in range(len(blocks))]
    sizes = [block_bytes(shape, block, facts.packed) for block in blocks]
    together = at_once * tokens.batch
    mixed = mix_bytes(facts, together, config.precision) + hidden_bytes(facts, together, config.precision)
    narrowed = narrowed_bytes(facts, config.space.expert_widths, config.precision)
    outputs = hidden_bytes(facts, (at_once - 1) * tokens.batch, config.precision)
    replaced = mix_bytes(facts, tokens.batch, config.precision) + outputs + narrowed
    running = max(attend_bytes(facts, together, config.precision), mixed, replaced if narrowed else 0)
    running += hidden_bytes(facts, tokens.batch, config.precision)

    def through(some: Sequence[Block], head: bool) -> float:
        """Milliseconds of both sets through some blocks; zero where time is not modelled."""
        times = (forward_ms(facts, some, config.max_sequences * length, length, head=head) for length in tokens.lengths)
        return sum(ms or 0.0 for ms in times)

    ms = (sum(counts) + 1) * through([], True)
    ms += sum(use * through([block], False) for use, block in zip(uses, blocks, strict=True))
    return Needs(
        read_bytes=sum(load * size for load, size in zip(loads, sizes, strict=True)) + outer_bytes(shape),
        **damage_memory(config, facts, tokens, at_once, running, compared=at_once),
        gpu_ms=None if facts.target is None else ms,
        counts={
            "tokens": tokens.count,
            "variants": sum(counts),
            "replacements": sum(counts) - len(counts),
            "block_forwards": sum(uses),
            "block_forwards_without_reuse": (sum(counts) + 1) * len(blocks),
        },
        smaller=("variants_per_batch", "batch_tokens", "max_long_tokens"),
    )


def check_inputs(config: ScoreBlocksConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if what is on offer does not fit the parent."""
    from moesaic.search.score_blocks.run import offers_of  # it loads torch

    offers_of(config.space, inputs.parent)


def simulate(task: PipelineTask[ScoreBlocksConfig], facts: Facts, model: Architecture) -> Peak:
    """The most that it holds on a device, found by running it on tensors without values."""
    from moesaic.search.simulated_memory import scoring_peak  # it loads torch

    return scoring_peak(task.config, facts.shape, model, facts.packed, facts.target is not None)

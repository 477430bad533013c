"""What ``refine_architecture`` needs."""

import math
from collections.abc import Sequence

from moesaic.costs.block_costs import block_bytes, outer_bytes
from moesaic.costs.facts import Facts, Needs, PipelineTask, ShardSizes, attend_bytes, hidden_bytes, mix_bytes, model_of
from moesaic.costs.times import forward_ms
from moesaic.models.architecture import Architecture
from moesaic.models.peak import Peak
from moesaic.search.damage_needs import MeasuredTokens, damage_memory
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig


def needs(task: PipelineTask[RefineArchitectureConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """The parent once, every assembly once, over both calibration sets.

    ::

        block forwards = L (1 + evaluations)
        layers read    = L (1 + ceil(evaluations / assemblies_per_round))
        device         = 1 layer unpacked, 1 packed, the head; a batch in attention or in the mixture, and its states
                         once more; or what comparing takes
        states         = (1 + assemblies_per_round) hidden states of both sets

    Time: the parent's blocks for all of them (an assembly's are cheaper). What is saved where assemblies begin alike is
    not counted, nor is the copy of a layer's experts where an assembly's are narrower.
    """
    config = task.config
    blocks = model_of(facts, inputs[0]).blocks
    at_once = config.assemblies_per_round
    rounds, tokens = math.ceil(config.evaluations / at_once), MeasuredTokens.of(config, at_once)
    attended, mixed = (of(facts, tokens.batch, config.precision) for of in (attend_bytes, mix_bytes))
    running = max(attended, mixed) + hidden_bytes(facts, tokens.batch, config.precision)
    times = [forward_ms(facts, blocks, config.max_sequences * each, each, head=True) for each in tokens.lengths]
    layers = sum(block_bytes(facts.shape, block, facts.packed) for block in blocks)
    return Needs(
        read_bytes=(1 + rounds) * layers + outer_bytes(facts.shape),
        **damage_memory(config, facts, tokens, at_once, running, compared=1),
        gpu_ms=None if facts.target is None else (1 + config.evaluations) * sum(ms or 0.0 for ms in times),
        counts={
            "tokens": tokens.count,
            "evaluations": config.evaluations,
            "block_forwards": (1 + config.evaluations) * len(blocks),
        },
        smaller=("assemblies_per_round", "batch_tokens", "max_long_tokens"),
    )


def simulate(task: PipelineTask[RefineArchitectureConfig], facts: Facts, model: Architecture) -> Peak:
    """The most that it holds on a device, found by running it on tensors without values."""
    from moesaic.search.simulated_memory import refinement_peak  # it loads torch

    return refinement_peak(task.config, facts.shape, model, facts.packed, facts.target is not None)

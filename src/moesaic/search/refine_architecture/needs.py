"""What ``refine_architecture`` needs."""

import math
from collections.abc import Sequence

from moesaic.costs.block_costs import block_bytes, outer_bytes
from moesaic.costs.facts import (
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    attend_bytes,
    compare_bytes,
    head_bytes,
    hidden_bytes,
    host_layers,
    largest_batch,
    mix_bytes,
    model_of,
    squares_bytes,
    streamed_layers,
)
from moesaic.costs.times import forward_ms
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
    not counted.
    """
    config = task.config
    blocks = model_of(facts, inputs[0]).blocks
    lengths = (config.max_tokens, config.max_long_tokens or config.max_tokens)
    tokens = config.max_sequences * sum(lengths)
    rounds = math.ceil(config.evaluations / config.assemblies_per_round)
    at_once = config.assemblies_per_round
    batch = max(largest_batch(config.batch_tokens // at_once, length, config.max_sequences) for length in lengths)
    running = max(attend_bytes(facts, batch, config.precision), mix_bytes(facts, batch, config.precision))
    running += hidden_bytes(facts, batch, config.precision)
    working = streamed_layers(facts, config.precision) + max(running, squares_bytes(facts, batch, config.precision))
    comparing = compare_bytes(facts, batch, at_once, 1, config.precision)
    times = [forward_ms(facts, blocks, config.max_sequences * length, length, head=True) for length in lengths]
    layers = sum(block_bytes(facts.shape, block, facts.packed) for block in blocks)
    return Needs(
        read_bytes=(1 + rounds) * layers + outer_bytes(facts.shape),
        device_bytes=head_bytes(facts, config.precision) + max(working, comparing),
        host_bytes=host_layers(facts),
        state_bytes=(1 + at_once) * hidden_bytes(facts, tokens, config.precision),
        gpu_ms=None if facts.target is None else (1 + config.evaluations) * sum(ms or 0.0 for ms in times),
        counts={
            "tokens": tokens,
            "evaluations": config.evaluations,
            "block_forwards": (1 + config.evaluations) * len(blocks),
        },
    )

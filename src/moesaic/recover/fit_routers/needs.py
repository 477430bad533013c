"""What ``fit_routers`` needs."""

from collections.abc import Sequence

from moesaic.costs.block_costs import block_bytes
from moesaic.costs.facts import (
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    attend_bytes,
    hidden_bytes,
    host_layers,
    largest_batch,
    mix_bytes,
    new_bytes,
    retrained,
    streamed_layers,
)
from moesaic.costs.times import forward_ms
from moesaic.models.peak import BATCH, LAYERS
from moesaic.recover.fit_routers.stage import FitRoutersConfig

_RETURNED = 2**25
"""Elements of outputs that are there at once, in float64 and, in three steps, as they are computed."""


def needs(task: PipelineTask[FitRoutersConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """One forward of the calibration set through parent and child; without tokens the child is handed on as it is.

    ::

        device = 1 layer unpacked, the next one of both models packed; a batch in attention or in the mixture, or of
                 all fitted and held-out tokens experts * (experts + 1) products in float64, and outputs of some
        states = hidden states of both models

    Time: both forwards. All experts of the fitted tokens, and the fit itself, are not counted.
    """
    config = task.config
    if not config.tokens:
        return Needs(made=inputs[0])
    tokens = config.max_sequences * config.max_tokens
    batch = largest_batch(config.batch_tokens, config.max_tokens, config.max_sequences)
    running = max(attend_bytes(facts, batch, config.precision), mix_bytes(facts, batch, config.precision))
    experts, seen = max(block.num_experts for block in facts.child.blocks), config.tokens * 10 / 9
    returned = min(seen * experts * facts.shape.hidden_size, _RETURNED) * (8 + 3 * 4)
    fitting = seen * experts * (experts + 1) * 8 + returned + 3 * hidden_bytes(facts, seen, config.precision)
    times = [forward_ms(facts, model.blocks, tokens, config.max_tokens, False) for model in (facts.parent, facts.child)]
    made = retrained(inputs[0], task.name, ("router",))
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs),
        written_bytes=new_bytes(made, inputs[0]),
        device={
            LAYERS: streamed_layers(facts, config.precision)
            + max(block_bytes(facts.shape, block, facts.packed) for block in facts.child.blocks),
            BATCH: max(running, fitting),
        },
        host_bytes=host_layers(facts),
        state_bytes=2 * hidden_bytes(facts, tokens, config.precision),
        gpu_ms=None if facts.target is None else sum(ms or 0.0 for ms in times),
        counts={"tokens": tokens, "fitted_tokens": config.tokens},
        made=made,
        smaller=("batch_tokens", "tokens"),
    )

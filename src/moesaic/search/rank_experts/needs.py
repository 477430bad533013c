"""What ``rank_experts`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import (
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    attend_bytes,
    expert_outputs_bytes,
    hidden_bytes,
    host_layers,
    largest_batch,
    model_of,
    most_experts_per_token,
    streamed_layers,
)
from moesaic.costs.times import forward_ms
from moesaic.models import layout
from moesaic.models.architecture import Architecture
from moesaic.models.peak import BATCH, LAYERS, Peak
from moesaic.search.rank_experts.stage import NUM_SPARE, RankExpertsConfig


def needs(task: PipelineTask[RankExpertsConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """One pass: reads all but the output head.

    Device: a layer unpacked and one packed; of a batch the states twice and what its experts take, spare ones included.
    ``tokens <= max_sequences * max_tokens``. Time is one forward without the head; a criterion that runs a spare expert
    per token adds ``1 / top_k`` of it, which is not counted.
    """
    config = task.config
    tokens = config.max_sequences * config.max_tokens
    batch = largest_batch(config.batch_tokens, config.max_tokens, config.max_sequences)
    slots = most_experts_per_token(facts)
    experts = expert_outputs_bytes(facts, batch, slots + NUM_SPARE.get(config.criterion, 0), config.precision)
    routed = 2 * hidden_bytes(facts, batch, config.precision) + experts
    working = max(attend_bytes(facts, batch, config.precision), routed)
    head = facts.shape.vocab_size * facts.shape.hidden_size * layout.BF16_BYTES
    return Needs(
        read_bytes=sum(inputs[0].values()) - head,
        device={LAYERS: streamed_layers(facts, config.precision), BATCH: working},
        host_bytes=host_layers(facts),
        state_bytes=hidden_bytes(facts, tokens, config.precision),
        gpu_ms=forward_ms(facts, model_of(facts, inputs[0]).blocks, tokens, config.max_tokens, head=False),
        counts={"tokens": tokens},
        smaller=("batch_tokens", "max_tokens"),
    )


def simulate(task: PipelineTask[RankExpertsConfig], facts: Facts, model: Architecture) -> Peak:
    """The most that it holds on a device, found by running it on tensors without values."""
    from moesaic.search.simulated_memory import ranking_peak  # it loads torch

    return ranking_peak(task.config, facts.shape, model, facts.packed, facts.target is not None)

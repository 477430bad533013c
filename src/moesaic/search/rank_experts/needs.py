"""What ``rank_experts`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import WIDTH, Facts, Needs, PipelineTask, ShardSizes, model_of, streamed_layers
from moesaic.costs.times import forward_ms
from moesaic.models import gpt_oss
from moesaic.search.rank_experts.stage import RankExpertsConfig


def needs(task: PipelineTask[RankExpertsConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """One pass: reads all but the output head; memory of a layer unpacked, one packed, and the set's hidden states.

    ``tokens <= max_sequences * max_tokens``. Time is one forward without the head; a criterion that runs a spare expert
    per token adds ``1 / top_k`` of it, which is not counted.
    """
    config = task.config
    tokens = config.max_sequences * config.max_tokens
    states = tokens * facts.shape.hidden_size * WIDTH[config.precision]
    head = facts.shape.vocab_size * facts.shape.hidden_size * gpt_oss.BF16_BYTES
    return Needs(
        read_bytes=sum(inputs[0].values()) - head,
        peak_bytes=streamed_layers(facts, config.precision) + states,
        gpu_ms=forward_ms(facts, model_of(facts, inputs[0]).blocks, tokens, config.max_tokens, head=False),
        counts={"tokens": tokens},
    )

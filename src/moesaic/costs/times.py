"""GPU time that the hardware table gives for forward passes, generation and training.

Times are milliseconds of all GPUs together. They are those of kernels at the table's rates: reading weights from disk,
waiting, and in training the communication between GPUs are not in them. None where time is not modelled.
"""

from collections.abc import Iterable, Sequence

from moesaic.core.errors import ConfigError
from moesaic.costs.block_costs import block_parameters, of_one_expert
from moesaic.costs.facts import Facts, trainable_parameters
from moesaic.costs.hardware import Target
from moesaic.costs.throughput import estimate_throughput
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block


def forward_ms(
    facts: Facts, blocks: Sequence[Block], num_tokens: float, sequence: int, head: bool = True
) -> float | None:
    """GPU time of tokens going through blocks, in sequences of one length, over all GPUs together::

        g * (sum_blocks (tokens / chunk) pass(chunk) + (tokens / sequence) attention(sequence)
             + tokens * 2 vocab hidden / g / dense_rate)

    with ``g`` GPUs, see ``moesaic.costs.hardware``.
    """
    if facts.target is None:
        return None
    target, chunk = facts.target, facts.target.table.chunk_tokens
    once = {
        block: num_tokens / chunk * target.pass_ms(block, chunk)
        + num_tokens / sequence * target.prompt_attention_ms(block, sequence)
        for block in set(blocks)
    }
    ms = sum(once[block] for block in blocks)
    if head:
        ms += num_tokens / chunk * target.dense_ms(facts.shape.vocab_size * facts.shape.hidden_size, chunk)
    return target.num_gpus * ms


def generate_ms(facts: Facts, model: Architecture, num_replies: float, reply_tokens: int) -> float | None:
    """GPU time of replies, all GPUs together: tokens over the throughput of as many requests as fit, times GPUs."""
    if facts.target is None:
        return None
    load = Workload(name="replies", input_tokens=facts.assumed.prompt_tokens, output_tokens=reply_tokens, concurrency=1)
    served = estimate_throughput(facts.target, model, load)
    if served.requests == 0:
        raise ConfigError(
            f"the model does not fit {facts.target.num_gpus} GPU(s) of table {facts.target.table.name}: "
            f"{-served.room_bytes / 2**30:.1f} GiB too little for a request; plan with more GPUs"
        )
    return facts.target.num_gpus * 1000 * num_replies * reply_tokens / served.tokens_per_s


def learn_ms(facts: Facts, num_tokens: float, sequence: int, words: Iterable[str], teacher: bool) -> float | None:
    """GPU time of training the child, from operations per token::

        matrices   (teacher) F_parent + 3 F_child + 2 trainable      forward, forward again, gradient of activations,
                                                                     and of the weights that learn
        attention  (teacher) A_parent + 4 A_child                    backward takes twice a forward

    ``F = 2 (attention projections + router + top-k experts + head)`` over the table's dense and expert rates,
    ``A = sum_layers 4 heads head_dim (visible pairs / sequence)`` over its attention rate. Experts get no gradient of
    their weights. The loss and the optimiser are not counted.
    """
    if facts.target is None:
        return None
    child, parent = _token_ms(facts, facts.child, sequence), _token_ms(facts, facts.parent, sequence)
    learning = 2 * (trainable_parameters(facts, words) - _embedding(facts, words))
    per_token = 3 * child[0] + 4 * child[1] + learning / (facts.target.table.dense_pflops * 1e12)
    return num_tokens * (per_token + (sum(parent) if teacher else 0.0))


def _embedding(facts: Facts, words: Iterable[str]) -> int:
    """Parameters of an embedding that learns; looking up rows is no matrix product."""
    return facts.shape.vocab_size * facts.shape.hidden_size if "embedding" in set(words) else 0


def _token_ms(facts: Facts, model: Architecture, sequence: int) -> tuple[float, float]:
    """One token's forward on one GPU: matrices, attention."""
    assert facts.target is not None, "only asked for where time is modelled"
    shape, table = facts.shape, facts.target.table
    moe_rate = table.moe[facts.target.num_gpus].pflops * 1e12
    alone = Target(table, shape, 1, facts.target.kv_cache)
    matrices = 2 * shape.vocab_size * shape.hidden_size / (table.dense_pflops * 1e12)
    attention = 0.0
    for block in model.blocks:
        expert = of_one_expert(block_parameters, shape, block)
        dense = block_parameters(shape, block) - block.num_experts * expert
        matrices += 2 * dense / (table.dense_pflops * 1e12) + 2 * block.experts_per_token * expert / moe_rate
        attention += alone.prompt_attention_ms(block, sequence) / sequence
    return matrices, attention

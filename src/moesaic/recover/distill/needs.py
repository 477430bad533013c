"""What ``distill`` needs, and on how many GPUs it fits."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.core.errors import InfeasibleError
from moesaic.costs.facts import (
    TRACE_BYTES_PER_TOKEN,
    TRAINED_BYTES,
    WIDTH,
    Facts,
    Needs,
    PipelineTask,
    Placement,
    ShardSizes,
    new_bytes,
    resident,
    retrained,
    room_bytes,
    trainable_parameters,
)
from moesaic.costs.times import learn_ms
from moesaic.models.architecture import Architecture
from moesaic.recover.distill.stage import DistillConfig, check_batch

if TYPE_CHECKING:
    from moesaic.models.peak import Peak

GPUS_PER_NODE = 8
MOST_NODES = 16
_SHORTEST_ROW = 4096


def needs(task: PipelineTask[DistillConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """Tokens = steps * rows_per_step * sequence_tokens. Time: :func:`~moesaic.costs.times.learn_ms` with a teacher.

    Memory: :func:`gpu_memory`. Only what learns has gradients and optimiser state. Reads the traces as well as both
    models.

    Raises:
        ConfigError: if there is no model class of the family for GPUs.
    """
    config = task.config
    if config.steps and facts.target:
        facts.shape.family.check_adapter("distill_on_gpus")
    tokens = config.steps * config.rows_per_step * config.sequence_tokens
    trainable = trainable_parameters(facts, config.trainable)
    made = retrained(inputs[0], task.name, config.trainable) if config.steps else inputs[0]
    return Needs(
        read_bytes=sum(sum(each.values()) for each in inputs) + tokens * TRACE_BYTES_PER_TOKEN,
        written_bytes=new_bytes(made, inputs[0]),
        device=gpu_memory(config, facts, facts.training_gpus if facts.target else 1),
        gpu_ms=learn_ms(facts, tokens, config.sequence_tokens, config.trainable, teacher=True),
        counts={
            "tokens": tokens,
            "trainable_parameters": trainable,
            "optimizer_bytes": trainable * TRAINED_BYTES,
        },
        made=made,
    )


def gpu_bytes(config: DistillConfig, facts: Facts, num_gpus: int) -> float:
    """The most that is alive on one of so many GPUs."""
    return sum(gpu_memory(config, facts, num_gpus).values())


def gpu_memory(config: DistillConfig, facts: Facts, num_gpus: int) -> dict[str, float]:
    """The same by what it is: when the loss learns, all layers' inputs being kept.

    With everything sharded, h = hidden, w = bytes of the precision, n = tokens of a forward pass and l layers::

        ((parent + child) * w + trainable * (16 - w)) / num_gpus            experts and parent unpacked
        + l * n * h * w                                                     inputs of the child's layers
        + 2 * l * min(n, hidden_tokens) * h * w                             states that are compared, of both models
        + 4 * n * h * w                                                     final states, before and after selection
        + (w + 4 * 4) * vocab * h                                           both heads whole, two gradients of one
        + 4 * logits_chunk_tokens * vocab * 4                               logits and their gradients

    The simulation (``automodel/simulation.py``) runs the step itself; they agree within 1.3 % from 8 to 128 GPUs, see
    docs/full_size.md.
    """
    shape, width, layers = facts.shape, WIDTH[config.precision], facts.child.num_layers
    trainable = trainable_parameters(facts, config.trainable)
    weights = sum(resident(facts, model, config.precision) for model in (facts.parent, facts.child))
    tokens = config.rows_per_forward * config.sequence_tokens
    compared = min(tokens, config.hidden_tokens)
    return {
        "weights": weights / num_gpus,
        "gradients, optimizer": trainable * (TRAINED_BYTES - width) / num_gpus,
        "inputs of layers": layers * tokens * shape.hidden_size * width,
        "states that are compared": (2 * layers * compared + 4 * tokens) * shape.hidden_size * width,
        "heads": (width + 16) * shape.vocab_size * shape.hidden_size,
        "logits": 4 * config.logits_chunk_tokens * shape.vocab_size * 4,
    }


def check_placement(config: DistillConfig, placement: Placement) -> None:
    """Raise ConfigError if the processes cannot share a step's rows evenly."""
    check_batch(config, placement.num_processes)


def simulate(task: PipelineTask[DistillConfig], facts: Facts, _model: Architecture) -> "Peak | None":
    """The most that a step holds on a GPU, found by running it on tensors without values; None without steps or GPUs.

    Raises:
        ConfigError: if AutoModel, which is part of the step, is not installed.
    """
    if not task.config.steps or facts.target is None:
        return None
    return simulated_peak(task.config, facts, facts.training_gpus // GPUS_PER_NODE)


def simulated_peak(config: DistillConfig, facts: Facts, nodes: int, worst_routing: bool = False) -> "Peak":
    """What the step itself takes on one GPU of so many nodes; it is run without GPUs, in a minute or two.

    ``worst_routing`` as in :func:`~moesaic.recover.distill.automodel.simulation.simulate`.

    Raises:
        ConfigError: if AutoModel, which is part of the step, is not installed.
    """
    from moesaic.recover.distill.automodel.launch import check_installed
    from moesaic.recover.distill.automodel.settings import Job, expert_parallel_size

    check_installed()
    from moesaic.recover.distill.automodel.simulation import simulate

    nowhere, gpus = Path(os.devnull), nodes * GPUS_PER_NODE
    sharing = expert_parallel_size(GPUS_PER_NODE, facts.parent, facts.child)
    job = Job(nowhere, nowhere, nowhere, nowhere, gpus, True, None, nodes, sharing)
    return simulate(config, facts.shape, facts.parent, facts.child, job, worst_routing=worst_routing)


def fewest_nodes(config: DistillConfig, facts: Facts) -> int:
    """The fewest nodes of eight GPUs, a power of two, that hold the distillation and share out its rows evenly.

    Raises:
        InfeasibleError: if not even the most nodes hold it, saying what would fit.
        ConfigError: if those that do cannot share the rows.
    """
    fitting = [nodes for nodes in _node_counts() if _fits(config, facts, nodes)]
    if not fitting:
        what = f"distill fits on no {MOST_NODES} nodes of {GPUS_PER_NODE} GPUs"
        raise InfeasibleError(f"{what}; {_advice(config, facts, MOST_NODES)}")
    for nodes in fitting:
        if config.rows_per_step % (nodes * GPUS_PER_NODE * config.rows_per_forward) == 0:
            return nodes
    check_batch(config, fitting[0] * GPUS_PER_NODE)
    raise AssertionError("a batch that could be shared was not found")


def check_nodes(config: DistillConfig, facts: Facts, nodes: int) -> None:
    """Raise ConfigError if so many nodes cannot share a step's rows, InfeasibleError if one of their GPUs is too small;
    both say what would fit."""
    check_batch(config, nodes * GPUS_PER_NODE)
    check_memory(gpu_bytes(config, facts, nodes * GPUS_PER_NODE), config, facts, nodes)


def check_memory(num_bytes: float, config: DistillConfig, facts: Facts, nodes: int) -> None:
    """Raise InfeasibleError if a GPU has no room for so many bytes, saying what would fit."""
    if num_bytes > room_bytes(facts):
        raise InfeasibleError(
            f"distill takes {num_bytes / 2**30:.1f} GiB on each of {nodes * GPUS_PER_NODE} GPUs, where "
            f"{room_bytes(facts) / 2**30:.1f} are to be had; {_advice(config, facts, nodes)}"
        )


def _advice(config: DistillConfig, facts: Facts, nodes: int) -> str:
    """What fits: more nodes with these rows, or these nodes with shorter rows."""
    found = [f"these rows on {more} nodes" for more in _node_counts() if _fits(config, facts, more)][:1]
    size = config.sequence_tokens
    while size > _SHORTEST_ROW and not _fits(config.but(sequence_tokens=size), facts, nodes):
        size //= 2
    if size < config.sequence_tokens and _fits(config.but(sequence_tokens=size), facts, nodes):
        found.append(f"rows of {size} tokens on {nodes} nodes")
    return "what fits: " + (" or ".join(found) or "a smaller model, or fewer rows_per_forward or hidden_tokens")


def _node_counts() -> list[int]:
    return [2**power for power in range(MOST_NODES.bit_length())]


def _fits(config: DistillConfig, facts: Facts, nodes: int) -> bool:
    return gpu_bytes(config, facts, nodes * GPUS_PER_NODE) <= room_bytes(facts)

"""Whether the tasks of a plan fit a GPU, and what would where one does not."""

from collections.abc import Sequence
from dataclasses import replace

from moesaic.core.errors import InfeasibleError, MoesaicError
from moesaic.costs.facts import Facts, Needs, room_bytes
from moesaic.platform.planning import Planned, needs_of
from moesaic.recover.distill.needs import GPUS_PER_NODE, MOST_NODES
from moesaic.stages import STAGES, find_stage

MIB, GIB = 2**20, 2**30
STATE_SHARE = 0.5
"""The share of a GPU's memory that hidden states take, if there are so many, as ``moesaic.models.streaming`` has it."""
_FEWEST_TOKENS = 1024
"""Of what is tried."""


def by_stage(planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    """The tasks that need any resources, by stage in the method's order."""
    tasks = {stage: [one for one in planned if one.task.stage == stage] for stage in STAGES}
    return {stage: members for stage, members in tasks.items() if any(one.needs.takes_something for one in members)}


def largest_by_stage(planned: Sequence[Planned]) -> list[Planned]:
    """Of each stage that holds something on a device the task that holds most of it."""
    largest = [max(members, key=lambda one: one.needs.device_bytes) for members in by_stage(planned).values()]
    return [one for one in largest if one.needs.device]


def check_devices(planned: Sequence[Planned], facts: Facts) -> None:
    """Refuse stages of which a task does not fit a GPU, hidden states included that stay on it.

    Raises:
        InfeasibleError: that names them, each with what would fit.
    """
    room, too_large = room_bytes(facts), []
    for one in largest_by_stage(planned):
        if (needed := _on_a_gpu(one.needs, facts)) <= room:
            continue
        if check_memory := find_stage(one.task.stage).planned_by("check_memory"):
            check_memory(needed, one.task.config, facts, facts.training_gpus // GPUS_PER_NODE)
        too_large.append(
            f"{one.task.stage} takes {needed / GIB:.1f} GiB on a GPU, where {room / GIB:.1f} are to be had; what fits: "
            + _what_fits(one, facts)
        )
    if too_large:
        raise InfeasibleError("; ".join(too_large))


def _on_a_gpu(needs: Needs, facts: Facts) -> float:
    assert facts.target is not None, "only modelled hardware has a known memory"
    return needs.device_bytes + min(needs.state_bytes, STATE_SHARE * facts.target.table.memory_mib * MIB)


def _what_fits(one: Planned, facts: Facts) -> str:
    """For each key that makes a stage smaller the first of its halves that fits, by the formulas."""
    if not (keys := one.needs.smaller):
        return one.needs.instead
    found = [f"{key} {value}" for key in keys if (value := _fitting(key, one, facts))]
    if one.needs.on_more_nodes and (nodes := _fitting_nodes(one, facts)):
        found.append(f"{nodes} nodes")
    return " or ".join(found) or f"a smaller model; none of {', '.join(keys)} is enough alone"


def _fitting_nodes(one: Planned, facts: Facts) -> int | None:
    """More nodes of eight GPUs that would hold what is trained."""
    nodes = facts.training_gpus // GPUS_PER_NODE
    while (nodes := 2 * nodes) <= MOST_NODES:
        needs = needs_of(one.task, replace(facts, training_gpus=GPUS_PER_NODE * nodes), one.inputs)
        if _on_a_gpu(needs, facts) <= room_bytes(facts):
            return nodes
    return None


def _fitting(key: str, one: Planned, facts: Facts) -> int | None:
    config = one.task.config
    value, least = getattr(config, key) or 0, _FEWEST_TOKENS if key.endswith("tokens") else 1
    while (value := value // 2) >= least:
        try:
            needs = needs_of(replace(one.task, config=config.but(**{key: value})), facts, one.inputs)
        except MoesaicError:
            return None  # the config takes no such value
        if _on_a_gpu(needs, facts) <= room_bytes(facts):
            return int(value)
    return None

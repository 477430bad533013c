"""What a plan is made of: the tasks of a pipeline, what is known of the models, and the shards of checkpoints.

Checkpoints are followed shard by shard, as the store keeps them: per layer one of experts and one of the rest, and one
of everything outside the layers. A shard is known by what determines its bytes, so one that two checkpoints share
counts once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moesaic.core.config import Config
from moesaic.costs.block_costs import block_bytes, block_parameters, outer_bytes
from moesaic.costs.hardware import Target
from moesaic.models import gpt_oss
from moesaic.models.architecture import Architecture
from moesaic.models.gpt_oss import ModelShape

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of an element."""
TRAINED_BYTES = 16
"""Of a parameter that learns: float32 weight, gradient, and both moments of AdamW."""
TRACE_BYTES_PER_TOKEN = 7
"""Of a token id in JSON, its separator included."""
Kind = TypeVar("Kind", bound=Config)

Shards = Mapping[str, int]
"""Bytes of a checkpoint's shards by what determines their content."""


@dataclass(frozen=True)
class PipelineTask(Generic[Kind]):
    """One task of a pipeline; a loop's tasks occur once per item."""

    name: str
    stage: str
    config: Kind
    models: tuple[str, ...]
    """The tasks it takes models from, in the order of its inputs; ``ingest`` hands on the parent."""


@dataclass(frozen=True)
class Assumed:
    """What only data and results can tell."""

    num_prompts: int = 100_000
    """Where a config does not limit them."""
    num_tasks: float = 8
    """Of an evaluation, each with as many problems as its config allows."""
    prompt_tokens: int = 1024
    """Of a problem."""
    reply_share: float = 0.5
    """Mean length of a reply, as a share of the most tokens it may have."""


@dataclass(frozen=True)
class Facts:
    """What the plan is for."""

    shape: ModelShape
    parent: Architecture
    packed: bool
    child: Architecture
    """Of every child, the search's and its rivals'; an assumption of the plan."""
    target: Target | None
    """None where the recipe measures: time is then not modelled."""
    assumed: Assumed = Assumed()


@dataclass(frozen=True)
class Needs:
    """What one task takes."""

    read_bytes: float = 0
    written_bytes: float = 0
    peak_bytes: float = 0
    """Resident, of the process that needs most."""
    gpu_ms: float | None = 0.0
    """All GPUs together; None where time is not modelled."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the other numbers follow from, by name."""
    made: Shards = field(default_factory=dict)
    """The checkpoint that it hands on."""

    @property
    def takes_something(self) -> bool:
        """Whether it is more than headers and small files."""
        return bool(self.read_bytes or self.written_bytes or self.gpu_ms or self.counts)


def whole_parent(facts: Facts) -> dict[str, int]:
    """The parent's shards, in its own sharding: one key stands for all of them."""
    return {"parent": gpt_oss.num_bytes(facts.shape, facts.parent, facts.packed)}


def pruned_shards(facts: Facts, candidate: str) -> dict[str, int]:
    """A child's shards. Layers that keep all experts, and what is outside them, are the same in every child."""
    shards = {"outer": outer_bytes(facts.shape)}
    for layer, (block, whole) in enumerate(zip(facts.child.blocks, facts.parent.blocks, strict=True)):
        specs = gpt_oss.layer_specs(facts.shape, layer, block, facts.packed)
        experts = sum(spec.num_bytes for key, spec in specs.items() if gpt_oss.is_expert_weight(key))
        kept = "" if block.num_experts == whole.num_experts else f" of {candidate}"
        shards[f"layer {layer} experts{kept}"] = experts
        shards[f"layer {layer} rest{kept}"] = sum(spec.num_bytes for spec in specs.values()) - experts
    return shards


def retrained(shards: Shards, task: str, words: Iterable[str]) -> dict[str, int]:
    """The shards when a task has changed the tensors of these groups (``Trainable``); experts stay."""
    words = set(words)
    outer, rest = bool(words & {"embedding", "head", "norms"}), bool(words & {"attention", "norms", "router"})

    def changed(key: str) -> bool:
        return (outer and key.startswith("outer")) or (rest and " rest" in key)

    return {f"{key.split(' by ')[0]} by {task}" if changed(key) else key: size for key, size in shards.items()}


def trainable_parameters(facts: Facts, words: Iterable[str]) -> int:
    """Parameters of the child that learn; experts are never among them."""
    specs = gpt_oss.tensor_specs(facts.shape, facts.child, facts.packed)
    return sum(specs[name].num_parameters for name in gpt_oss.trainable_names(facts.shape, facts.child, words))


def resident(facts: Facts, model: Architecture, precision: str) -> float:
    """A model in memory with its experts unpacked: parameters times the precision's bytes."""
    return gpt_oss.num_parameters(facts.shape, model) * WIDTH[precision]


def streamed_layers(facts: Facts, precision: str) -> float:
    """The layer at work, unpacked, and the next one as it is stored, being read."""
    unpacked = max(block_parameters(facts.shape, block) for block in facts.parent.blocks) * WIDTH[precision]
    return unpacked + max(block_bytes(facts.shape, block, facts.packed) for block in facts.parent.blocks)


def two_layers(facts: Facts, precision: str) -> float:
    """A layer of each of two models, unpacked."""
    return 2 * max(block_parameters(facts.shape, block) for block in facts.parent.blocks) * WIDTH[precision]


def model_of(facts: Facts, shards: Shards) -> Architecture:
    """Which model a checkpoint is of."""
    return facts.parent if "parent" in shards else facts.child


def reply_tokens(facts: Facts, longest: int) -> int:
    """Mean length of a reply, given the most it may have."""
    return max(1, round(facts.assumed.reply_share * longest))


def held(engine: str, precision: str, facts: Facts, shards: Shards) -> float:
    """Of a model that generates: unpacked in process and under ``moesaic``, else one GPU's share of the packed weights.

    The KV cache of a serving engine takes what is left, and is not counted.
    """
    if engine in ("in_process", "moesaic"):
        return resident(facts, model_of(facts, shards), precision)
    return sum(shards.values()) / (facts.target.num_gpus if facts.target else 1)


def new_bytes(made: Shards, given: Shards) -> int:
    """Bytes of the shards that a stage wrote anew."""
    return sum(size for key, size in made.items() if key not in given)

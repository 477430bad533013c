"""What a plan is computed from: the tasks of a pipeline, facts about the models, and the sizes of checkpoint shards.

The store keeps a checkpoint as shards: for each layer one with the experts and one with all other tensors, and one with
everything outside the layers. A shard's key names what determines its content, so a shard that two checkpoints share
has one key and counts once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from moesaic.core.config import Config
from moesaic.costs.block_costs import block_bytes, block_parameters, outer_bytes
from moesaic.costs.hardware import Target
from moesaic.models import layout
from moesaic.models.architecture import Architecture
from moesaic.models.families.family import ModelShape

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of an element."""
TRAINED_BYTES = 16
"""Bytes of a parameter that learns: float32 weight, gradient, and both moments of AdamW."""
TRACE_BYTES_PER_TOKEN = 7
"""Bytes of a token id in JSON, its separator included."""
ROOM = 0.9
"""The share of a GPU's memory that tensors may take; the rest is CUDA's, NCCL's and lost to fragmentation."""
Kind = TypeVar("Kind", bound=Config)

ShardSizes = Mapping[str, int]
"""Bytes of each shard of a checkpoint, by a key that names what determines its content."""


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
    """Values that depend on data and results, and are assumed until these exist."""

    num_prompts: int = 100_000
    """Prompts of a data set whose size the config does not limit."""
    num_tasks: float = 8
    """Tasks of an evaluation, each with as many problems as its config allows."""
    prompt_tokens: int = 1024
    """Prompt tokens of a problem."""
    reply_share: float = 0.5
    """Mean length of a reply, as a share of the most tokens it may have."""


@dataclass(frozen=True)
class Facts:
    """The models and the hardware that are planned for."""

    shape: ModelShape
    parent: Architecture
    packed: bool
    child: Architecture
    """The architecture that the plan assumes for every child: the search's and the baselines'."""
    target: Target | None
    """The modelled hardware. None if the recipe measures; the plan then has no times."""
    assumed: Assumed = Assumed()
    training_gpus: int = 8
    """GPUs of that hardware that a distillation is spread over."""


@dataclass(frozen=True)
class Placement:
    """Where a cluster profile puts a stage."""

    stage: str
    num_gpus: int
    """Of all nodes that its engine has."""
    num_processes: int
    """Of its engine: one on each GPU, or one on each node without."""
    on_job: bool
    """Whether its engine has the nodes of a job."""
    has_tensorrt_llm: bool
    """Whether TensorRT-LLM is in the image."""
    exports: tuple[Any, ...] = ()
    """Configs of the pipeline's ``export_engine``."""


@dataclass(frozen=True)
class Needs:
    """Bytes, memory and GPU time that one task needs."""

    read_bytes: float = 0
    written_bytes: float = 0
    device: Mapping[str, float] = field(default_factory=dict)
    """The most bytes that one device which computes must hold at once, by what they are: a GPU, or the host where there
    is none."""
    host_bytes: float = 0
    """Beside that, what the host must hold for it."""
    state_bytes: float = 0
    """Hidden states, at most: they stay on the device and in the host's memory as far as there is room, the rest is on
    disk."""
    gpu_ms: float | None = 0.0
    """Time of all GPUs together; None if time is not modelled."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the other numbers follow from, by name."""
    made: ShardSizes = field(default_factory=dict)
    """The shards of the checkpoint that the task writes."""
    smaller: tuple[str, ...] = ()
    """Config keys of which less makes it smaller on a device."""
    on_more_nodes: bool = False
    """Whether a device holds less of it when there are more."""
    instead: str = "an engine on more GPUs, which keeps experts packed"
    """What fits where no key makes it smaller."""

    @property
    def device_bytes(self) -> float:
        """All that a device holds at once."""
        return sum(self.device.values())

    @property
    def takes_something(self) -> bool:
        """Whether the task needs more than to read headers and small files."""
        return bool(self.read_bytes or self.written_bytes or self.gpu_ms or self.counts)


def whole_parent(facts: Facts) -> dict[str, int]:
    """The parent's shards, in its own sharding: one key stands for all of them."""
    return {"parent": layout.num_bytes(facts.shape, facts.parent, facts.packed)}


def pruned_shards(facts: Facts, candidate: str) -> dict[str, int]:
    """A child's shards. Layers that keep all experts whole, and what is outside them, are the same in every child."""
    shards = {"outer": outer_bytes(facts.shape)}
    for layer, (block, whole) in enumerate(zip(facts.child.blocks, facts.parent.blocks, strict=True)):
        specs = layout.layer_specs(facts.shape, layer, block, facts.packed)
        experts = sum(spec.num_bytes for key, spec in specs.items() if layout.is_expert_weight(key))
        sizes = [(one.num_experts, one.expert_width) for one in (block, whole)]
        kept = "" if sizes[0] == sizes[1] else f" of {candidate}"
        if experts:
            shards[f"layer {layer} experts{kept}"] = experts
        shards[f"layer {layer} rest{kept}"] = sum(spec.num_bytes for spec in specs.values()) - experts
    return shards


def retrained(shards: ShardSizes, task: str, words: Iterable[str]) -> dict[str, int]:
    """The shards when a task has changed the tensors of these groups (``Trainable``); experts stay."""
    words = set(words)
    outer = bool(words & {"embedding", "head", "norms"})
    rest = bool(words & {"attention", "norms", "router", "feed_forward"})

    def changed(key: str) -> bool:
        return (outer and key.startswith("outer")) or (rest and " rest" in key)

    return {f"{key.split(' by ')[0]} by {task}" if changed(key) else key: size for key, size in shards.items()}


def trainable_parameters(facts: Facts, words: Iterable[str]) -> int:
    """Parameters of the child that learn; experts are never among them."""
    specs = layout.tensor_specs(facts.shape, facts.child, facts.packed)
    return sum(specs[name].num_parameters for name in layout.trainable_names(facts.shape, facts.child, words))


def resident(facts: Facts, model: Architecture, precision: str) -> float:
    """A model in memory with its experts unpacked: parameters times the precision's bytes."""
    return layout.num_parameters(facts.shape, model) * WIDTH[precision]


def unpacked_layer(facts: Facts, precision: str) -> float:
    """Bytes of the largest layer, unpacked."""
    return max(block_parameters(facts.shape, block) for block in facts.parent.blocks) * WIDTH[precision]


def streamed_layers(facts: Facts, precision: str) -> float:
    """Bytes of the current layer, unpacked, and of the next one, which is read as it is stored."""
    return unpacked_layer(facts, precision) + max(
        block_bytes(facts.shape, block, facts.packed) for block in facts.parent.blocks
    )


def host_layers(facts: Facts) -> float:
    """Bytes of the host's two buffers through which layers reach a GPU, and of the embedding, which is read there."""
    buffers = 2 * max(block_bytes(facts.shape, block, facts.packed) for block in facts.parent.blocks)
    return (buffers if facts.target else 0) + facts.shape.vocab_size * facts.shape.hidden_size * layout.BF16_BYTES


def head_bytes(facts: Facts, precision: str) -> float:
    """Bytes of the output head."""
    return facts.shape.vocab_size * facts.shape.hidden_size * WIDTH[precision]


def hidden_bytes(facts: Facts, num_tokens: float, precision: str) -> float:
    """Bytes of hidden states."""
    return num_tokens * facts.shape.hidden_size * WIDTH[precision]


def expert_outputs_bytes(facts: Facts, num_tokens: float, slots: int, precision: str) -> float:
    """What one expert after the other takes: of every token and slot the input, the output, and outputs in a row; and
    of one expert's share of them three times its width."""
    share = num_tokens * slots / min(block.num_experts for block in facts.parent.blocks if not block.is_dense)
    own = 3 * share * widest_expert(facts) * WIDTH[precision]
    return 3 * slots * hidden_bytes(facts, num_tokens, precision) + own


def attend_bytes(facts: Facts, num_tokens: float, precision: str) -> float:
    """What a layer's attention half takes: the states, normed as well, K, V, and four times as much as Q."""
    shape = facts.shape
    values = 4 * shape.num_heads * shape.head_dim + 2 * shape.num_kv_heads * shape.head_dim
    return 2 * hidden_bytes(facts, num_tokens, precision) + num_tokens * values * WIDTH[precision]


def most_experts_per_token(facts: Facts) -> int:
    """Experts that a token uses in the parent's layer with most of them."""
    return max(block.experts_per_token for block in facts.parent.blocks)


def widest_expert(facts: Facts) -> int:
    """Channels of an expert of the parent's layer with the widest ones."""
    return max(block.expert_width for block in facts.parent.blocks)


def narrowed_bytes(facts: Facts, widths: Iterable[int], precision: str) -> float:
    """A copy of a layer's experts with the most channels on offer that are fewer than their own."""
    copies = (
        block.num_experts * width * (3 * facts.shape.hidden_size + 2)
        for block in facts.parent.blocks
        for width in widths
        if width < block.expert_width
    )
    return max(copies, default=0) * WIDTH[precision]


def mix_bytes(facts: Facts, num_tokens: float, precision: str) -> float:
    """What a layer's mixture half takes: the states before attention, behind it, normed, and what the experts take.

    On a GPU all experts go at once, ``EXPERT_TOKENS`` tokens at a time. Of every token and slot there are its input,
    ``2 I`` biases and ``2 I`` outputs of the first projection, and five of ``I`` in the gate, with ``I`` the expert's
    width; the outputs of the tokens before are there as well, and in the end all of them twice.
    """
    slots, outputs = most_experts_per_token(facts), hidden_bytes(facts, num_tokens, precision)
    if facts.target is None:
        return 3 * outputs + expert_outputs_bytes(facts, num_tokens, slots, precision)
    chunk = min(num_tokens, layout.EXPERT_TOKENS)
    gate = chunk * slots * (facts.shape.hidden_size + 9 * widest_expert(facts)) * WIDTH[precision]
    return 3 * outputs + max(2 * outputs, outputs - hidden_bytes(facts, chunk, precision) + gate)


def squares_bytes(facts: Facts, num_tokens: float, precision: str) -> float:
    """What summing up the parent's outputs takes: as they are, normed in float32, and two squares in float64."""
    return num_tokens * facts.shape.hidden_size * (20 + WIDTH[precision])


def compare_bytes(facts: Facts, num_tokens: float, changed: int, normed_at_once: int, precision: str) -> float:
    """What comparing changed models with their parent takes at the output, where no layer is in memory.

    Norms in float32 are in three steps. Then the states of all are there, of which ``COMPARED_LOGITS`` next-token
    logits at a time, or as many states in float64, are compared.
    """
    shape = facts.shape
    norms = normed_at_once * num_tokens * shape.hidden_size * (12 + WIDTH[precision])
    at_once = max(1, layout.COMPARED_LOGITS // shape.vocab_size // changed)
    chunk = changed * min(num_tokens, at_once) * max(36 * shape.hidden_size, 20 * shape.vocab_size)
    return max(norms, 4 * (changed + 1) * num_tokens * shape.hidden_size + chunk)


def largest_batch(batch_tokens: int, max_tokens: int, max_sequences: int) -> int:
    """Tokens of the largest batch, at least one sequence, padding included."""
    return min(max_sequences, max(1, batch_tokens // max_tokens)) * max_tokens


def room_bytes(facts: Facts) -> float:
    """Bytes that tensors may take of one GPU of the target."""
    assert facts.target is not None, "only modelled hardware has a known memory"
    return ROOM * facts.target.table.memory_mib * 2**20


def two_layers(facts: Facts, precision: str) -> float:
    """Bytes of one unpacked layer of each of two models."""
    return 2 * max(block_parameters(facts.shape, block) for block in facts.parent.blocks) * WIDTH[precision]


def model_of(facts: Facts, shards: ShardSizes) -> Architecture:
    """The architecture of a checkpoint: the parent's or the child's."""
    return facts.parent if "parent" in shards else facts.child


def reply_tokens(facts: Facts, longest: int) -> int:
    """Mean length of a reply, given the most it may have."""
    return max(1, round(facts.assumed.reply_share * longest))


def new_bytes(made: ShardSizes, given: ShardSizes) -> int:
    """Bytes of the shards that a stage wrote anew."""
    return sum(size for key, size in made.items() if key not in given)

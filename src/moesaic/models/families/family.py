"""What a family of models says of itself; :mod:`moesaic.models.families` lists those that Moesaic reads.

A family is data, and a few functions of sizes. What computes is transformers' own: its decoder layer, and the layout of
its experts in memory, which its module tells (``is_transposed``, ``is_concatenated``, ``has_bias``). How experts lie on
disk, all in one tensor or each in tensors of its own, their names tell (:mod:`moesaic.models.layout`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from moesaic.core.errors import ConfigError
from moesaic.models.architecture import AXES, Architecture, Block

MXFP4_BLOCK = 32
"""Channels in a row that share a scale."""

TransformersClass = Literal["Config", "DecoderLayer", "RMSNorm", "RotaryEmbedding", "ForCausalLM"]
Scores = Literal["softmax", "sigmoid"]
"""What a token's experts are chosen and weighted by, see :func:`moesaic.models.layers.router_scores`."""


def _nothing(_: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: its safetensors dtype and shape, and how many parameters it stores.

    One in F32 stays in float32 in every precision. One without parameters is never trained.
    """

    dtype: str
    shape: tuple[int, ...]
    num_parameters: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk and, for packed weights, in a serving engine's memory."""
        return math.prod(self.shape) * {"U8": 1, "BF16": 2, "F32": 4}[self.dtype]


@dataclass(frozen=True)
class ModelShape:
    """Sizes that all layers of a model share, and its family; what differs by layer is its ``Architecture``."""

    family: "Family" = field(repr=False)
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    own: Mapping[str, int] = field(default_factory=dict, hash=False)
    """What else its family's tensors follow from, see :attr:`Family.own_sizes`: widths, and bools for parts."""

    @property
    def kv_elements(self) -> int:
        """Key and value elements that one token leaves in one layer's cache."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Published:
    """A parent that its makers publish."""

    shape: ModelShape
    architecture: Architecture
    num_shards: int
    child: tuple[str, Architecture] | None = None
    """A child of it that is published as well: its name and blocks."""


@dataclass(frozen=True, eq=False)
class Family:
    """Models of one kind, parents and children: names, constants and layout."""

    name: str
    """What people call it."""
    parent_type: str
    """The ``model_type`` of a parent, and the name of transformers' modules for it. A child's has ``_puzzle`` added."""
    prefix: str
    """What the names of transformers' classes for it begin with. A child's have ``Puzzle`` added."""
    router: str
    """The router's module within a layer."""
    not_packed: tuple[str, ...]
    """What ``quantization_config.modules_to_not_convert`` lists where experts are in MXFP4: everything but them. Empty
    if its experts cannot be."""
    config_keys: Mapping[str, str]
    """What a parent's config calls an axis of :data:`~moesaic.models.architecture.AXES`, where that is not its key."""
    spells_layer_types: bool
    """Whether its configs have ``layer_types``; a child's then has its blocks as ``per_layer_config`` as well."""
    constants: Mapping[str, Any]
    """What every model of the family computes with, by key of its config."""
    sizes: tuple[str, ...]
    """Keys of its config that must be at least 1."""
    aliases: Mapping[str, str]
    """Second names of keys, which are left out: in a child they would go on naming its parent's value."""
    rope_types: Mapping[str, tuple[str, ...]]
    """By type of RoPE that engines compute for it what they read of that, and all of it."""
    adapters: tuple[str, ...]
    """Of the programs that need code of their own for a family those that have it: serving engines as bundles name
    them, ``fp8_cache`` in these, ``distill_on_gpus`` (AutoModel with a model class of ours), ``nemo_rl``."""
    vllm_constants: Mapping[str, Any]
    """What vLLM computes with, whatever the config says, by key of that."""
    norms_in_float32: bool
    """Whether transformers keeps the layers' norms in float32, whatever the other weights are in."""
    layer_specs: Callable[[ModelShape, Block, bool], dict[str, TensorSpec]]
    """Every tensor of one layer on disk, by its name within the layer; the last value says whether experts are packed,
    where the family has that."""
    example_config: Callable[[ModelShape, Architecture], dict[str, Any]]
    """A ``config.json`` of a parent of these sizes, as the published ones are."""
    scores: Scores = "softmax"
    """What a token's experts are chosen and weighted by."""
    own_sizes: Callable[[Mapping[str, Any]], dict[str, int]] = _nothing
    """Out of a resolved config what its tensors follow from that not all families have, see :attr:`ModelShape.own`."""
    first_dense_key: str | None = None
    """What its config calls the number of first layers without experts; None if it has no such layers."""
    extra_layers_key: str | None = None
    """What its config calls the number of layers behind the last that predict further tokens. They are not used, and a
    child does not have them."""
    child_values: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    """What a child's config says of its parent's resolved one, beside its blocks."""
    has_own_layer: bool = False
    """Whether the child's module has the layer as well, since transformers' own cannot be built of every block."""

    @property
    def parent_class(self) -> str:
        """What engines choose a parent's code by."""
        return f"{self.prefix}ForCausalLM"

    @property
    def child_type(self) -> str:
        """The ``model_type`` of a child, and of the folder here with the classes that travel with it."""
        return f"{self.parent_type}_puzzle"

    @property
    def child_class(self) -> str:
        """What engines choose a child's code by."""
        return f"{self.prefix}PuzzleForCausalLM"

    def of_transformers(self, kind: TransformersClass) -> Any:
        """One of transformers' own classes for a parent, or its layer."""
        module = "configuration" if kind == "Config" else "modeling"
        home = import_module(f"transformers.models.{self.parent_type}.{module}_{self.parent_type}")
        return getattr(home, f"{self.prefix}{kind}")

    @property
    def layer_class(self) -> Any:
        """The decoder layer that a block is built as."""
        return self.of_child("DecoderLayer") if self.has_own_layer else self.of_transformers("DecoderLayer")

    def of_child(self, kind: Literal["Config", "DecoderLayer", "ForCausalLM"]) -> Any:
        """One of the classes that travel with a child."""
        module = "configuration" if kind == "Config" else "modeling"
        home = import_module(f"moesaic.models.families.{self.child_type}.{module}_{self.child_type}")
        return getattr(home, f"{self.prefix}Puzzle{kind}")

    def check_adapter(self, program: str) -> None:
        """Raise ConfigError where a program has no code for this family."""
        if program not in self.adapters:
            raise ConfigError(
                f"{program} cannot run models of the family {self.name}: Moesaic has no model class of it for that; "
                f"for this family there are {', '.join(self.adapters)}"
            )

    def config_key(self, axis: str) -> str:
        """What a parent's config calls an axis."""
        return self.config_keys.get(axis, AXES[axis].key)


def bf16(*shape: int) -> TensorSpec:
    """A tensor in BF16."""
    return TensorSpec("BF16", shape, math.prod(shape))


def norm_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """The weights of a layer's two norms."""
    return {f"{name}_layernorm.weight": bf16(shape.hidden_size) for name in ("input", "post_attention")}


def projection_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """The weights of attention's four projections."""
    hidden, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    return {f"self_attn.{name}_proj.weight": bf16(*size) for name, size in sizes.items()}


def check_packable(expert_width: int) -> None:
    """Raise ConfigError for a width that MXFP4 cannot store: it packs the channels that are summed over by 32."""
    if expert_width % MXFP4_BLOCK:
        raise ConfigError(
            f"expert width {expert_width} cannot be stored in MXFP4, which packs multiples of {MXFP4_BLOCK}; choose one"
        )

"""Facts of the gpt-oss family: sizes, tensor names, layouts on disk. Nothing else in Moesaic names or guesses them.

Sources: OpenAI's gpt-oss model card and the checkpoint layouts of gpt-oss-120b and gpt-oss-puzzle-88B. On disk an
expert tensor's rows are *output* features, packed in MXFP4; in memory transformers keeps the transpose.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models.architecture import AXES, Architecture, Block

PARENT_TYPE = "gpt_oss"
CHILD_TYPE = "gpt_oss_puzzle"
CHILD_CLASS = "GptOssPuzzleForCausalLM"
BF16_BYTES = 2
MXFP4_BLOCK = 32
NOT_PACKED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
"""What ``quantization_config.modules_to_not_convert`` lists: everything but the experts."""

COMPARED_LOGITS = 2**22
"""Next-token logits of each model that are compared at once."""
EXPERT_TOKENS = 16_384
"""Tokens that a GPU takes through a layer's experts at once; more would only take more memory."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
PACKED_PROJECTIONS = ("gate_up_proj", "down_proj")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: its safetensors dtype and shape, and how many parameters it stores."""

    dtype: str
    shape: tuple[int, ...]
    num_parameters: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk and, for packed weights, in a serving engine's memory."""
        return math.prod(self.shape) * {"U8": 1, "BF16": 2, "F32": 4}[self.dtype]


@dataclass(frozen=True)
class ModelShape:
    """Sizes that all layers of a gpt-oss model share; what differs by layer is its ``Architecture``."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int

    @property
    def kv_elements(self) -> int:
        """Key and value elements that one token leaves in one layer's cache."""
        return 2 * self.num_kv_heads * self.head_dim


GPT_OSS_120B = ModelShape(2880, 64, 8, 64, 201_088, 131_072)
GPT_OSS_120B_BLOCKS = Architecture.of(Block(128, 4, 2880, None if layer % 2 else 128) for layer in range(36))
GPT_OSS_20B = ModelShape(2880, 64, 8, 64, 201_088, 131_072)
GPT_OSS_20B_BLOCKS = Architecture.of(Block(32, 4, 2880, None if layer % 2 else 128) for layer in range(24))

_PUZZLE_8K = frozenset({3, 5, 21, 23, 27, 31, 33, 35})
_PUZZLE_HALVED = frozenset({15, 17, 19, *range(21, 36)})
GPT_OSS_PUZZLE_88B_BLOCKS = Architecture.of(
    Block(
        64 if layer in _PUZZLE_HALVED else 128,
        4,
        2880,
        128 if layer % 2 == 0 else 8192 if layer in _PUZZLE_8K else None,
    )
    for layer in range(36)
)
"""The released child's layout, block for block."""


def read_config(config: Mapping[str, Any]) -> tuple[ModelShape, Architecture]:
    """Sizes and layout out of a resolved config (:mod:`moesaic.models.resolved_config`).

    Raises:
        ArtifactError: for a block that the family cannot have.
    """
    shape = ModelShape(
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
    )
    entries = config["block_configs"] if config["model_type"] == CHILD_TYPE else _parent_entries(config)
    return shape, Architecture.of(_read_block(layer, entry) for layer, entry in enumerate(entries))


def _parent_entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A parent's layers as ``block_configs`` would spell them: alike but for the windows."""
    window, sliding = config["sliding_window"], "sliding_attention"
    if window is None and sliding in config["layer_types"]:
        raise ArtifactError(f"layer_types has {sliding}, but sliding_window is null; it must be at least 2 tokens")
    alike = {axis.key: config[axis.key] for axis in AXES.values()}
    return [alike | {"sliding_window": window if kind == sliding else None} for kind in config["layer_types"]]


def _read_block(layer: int, entry: Mapping[str, Any]) -> Block:
    try:
        return Block.from_config(entry)
    except ConfigError as wrong:
        raise ArtifactError(f"layer {layer}: {wrong}") from wrong


def child_config(
    parent: Mapping[str, Any], architecture: Architecture, yarn_factor: float | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a child: its parent's resolved one, with its blocks and the class that reads them.

    The blocks stand there as ``block_configs`` and as transformers' own ``per_layer_config``.

    RoPE stands there in both spellings: engines of transformers 4's age read ``rope_theta`` and ``rope_scaling`` only
    and fall back to wrong defaults without a word. Both get ``yarn_factor``, if it is given.
    """
    if yarn_factor is not None:
        places = ("rope_scaling", "rope_parameters")
        parent = dict(parent) | {place: {**parent[place], "factor": yarn_factor} for place in places}
    kinds = ["full_attention" if block.window is None else "sliding_attention" for block in architecture.blocks]
    return (
        dict(parent)
        | {
            "model_type": CHILD_TYPE,
            "architectures": [CHILD_CLASS],
            "auto_map": {
                "AutoConfig": "configuration_gpt_oss_puzzle.GptOssPuzzleConfig",
                "AutoModelForCausalLM": f"modeling_gpt_oss_puzzle.{CHILD_CLASS}",
            },
            "block_configs": [block.as_config() for block in architecture.blocks],
            "per_layer_config": {str(layer): block.as_config() for layer, block in enumerate(architecture.blocks)},
            "layer_types": kinds,
            "num_hidden_layers": architecture.num_layers,
        }
        | _of_the_largest(architecture)
    )


def _of_the_largest(architecture: Architecture) -> dict[str, int | None]:
    """The values that engines without blocks make room for; windows stay, as ``layer_types`` goes by them."""
    entries = [block.as_config() for block in architecture.blocks]
    return {axis.key: max(entry[axis.key] or 0 for entry in entries) for axis in AXES.values() if not axis.unlimited}


def layer_prefix(layer: int) -> str:
    """What every tensor name of a layer starts with."""
    return f"model.layers.{layer}."


def kv_scale_names(num_layers: int) -> list[str]:
    """Scalars that a checkpoint with a calibrated FP8 KV cache adds to its layout: K's and V's scale of each layer."""
    return [f"{layer_prefix(layer)}self_attn.{state}_scale" for layer in range(num_layers) for state in "kv"]


def is_expert_indexed(name: str) -> bool:
    """Whether the first axis of this tensor counts a layer's experts: expert weights and biases, router rows."""
    return ".mlp.experts." in name or ".mlp.router." in name


def is_expert_weight(name: str) -> bool:
    """Whether the tensor belongs to the experts themselves, which recovery keeps frozen."""
    return ".mlp.experts." in name


def trainable_names(shape: ModelShape, architecture: Architecture, groups: Iterable[str]) -> list[str]:
    """Checkpoint names of the tensors that recovery may change, by the words of ``Trainable``."""
    wanted = set(groups)
    names = tensor_specs(shape, architecture)
    return [name for name in names if not is_expert_weight(name) and _group(name) in wanted]


def _group(name: str) -> str:
    """The word for what a tensor outside the experts belongs to."""
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "head"
    if ".mlp.router." in name:
        return "router"
    return "attention" if ".self_attn." in name else "norms"


def layer_specs(shape: ModelShape, layer: int, block: Block, packed: bool = True) -> dict[str, TensorSpec]:
    """Name, dtype and shape of every tensor of one layer on disk."""
    specs = _attention_specs(shape) | _expert_specs(shape, block, packed)
    return {layer_prefix(layer) + name: spec for name, spec in specs.items()}


def _attention_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    hidden, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    specs = {
        "input_layernorm.weight": _bf16(hidden),
        "post_attention_layernorm.weight": _bf16(hidden),
        "self_attn.sinks": _bf16(shape.num_heads),
    }
    for projection, rows, columns in (
        ("q", queries, hidden),
        ("k", keys, hidden),
        ("v", keys, hidden),
        ("o", hidden, queries),
    ):
        specs[f"self_attn.{projection}_proj.weight"] = _bf16(rows, columns)
        specs[f"self_attn.{projection}_proj.bias"] = _bf16(rows)
    return specs


def _expert_specs(shape: ModelShape, block: Block, packed: bool) -> dict[str, TensorSpec]:
    hidden, inner, experts = shape.hidden_size, block.expert_width, block.num_experts
    if packed:
        check_packable(inner)
    specs = {"mlp.router.weight": _bf16(experts, hidden), "mlp.router.bias": _bf16(experts)}
    for projection, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        name = f"mlp.experts.{projection}"
        specs[f"{name}_bias"] = _bf16(experts, rows)
        if packed:
            blocks = columns // MXFP4_BLOCK
            specs[f"{name}_blocks"] = TensorSpec(
                "U8", (experts, rows, blocks, MXFP4_BLOCK // 2), experts * rows * columns
            )
            specs[f"{name}_scales"] = TensorSpec("U8", (experts, rows, blocks), 0)
        else:
            specs[name] = _bf16(experts, columns, rows)
    return specs


def check_packable(expert_width: int) -> None:
    """Raise ConfigError for a width that MXFP4 cannot store: it packs the channels that are summed over by 32."""
    if expert_width % MXFP4_BLOCK:
        raise ConfigError(
            f"expert width {expert_width} cannot be stored in MXFP4, which packs multiples of {MXFP4_BLOCK}; choose one"
        )


def outer_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """The tensors outside the layers: embedding, final norm and (untied) output head."""
    table = _bf16(shape.vocab_size, shape.hidden_size)
    return {EMBEDDING: table, FINAL_NORM: _bf16(shape.hidden_size), HEAD: table}


def tensor_specs(shape: ModelShape, architecture: Architecture, packed: bool = True) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint. Sizes of models follow from this table; nothing is allocated."""
    specs = outer_specs(shape)
    for layer, block in enumerate(architecture.blocks):
        specs |= layer_specs(shape, layer, block, packed)
    return specs


def num_parameters(shape: ModelShape, architecture: Architecture) -> int:
    """Parameters of the model."""
    return sum(spec.num_parameters for spec in tensor_specs(shape, architecture).values())


def num_bytes(shape: ModelShape, architecture: Architecture, packed: bool = True) -> int:
    """Bytes of the checkpoint's tensors."""
    return sum(spec.num_bytes for spec in tensor_specs(shape, architecture, packed).values())


def _bf16(*shape: int) -> TensorSpec:
    return TensorSpec("BF16", shape, math.prod(shape))

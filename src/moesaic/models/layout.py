"""What a checkpoint consists of, in any family: sizes, blocks, names and shapes of its tensors, a child's config.

Experts lie on disk either all in one tensor, whose first axis counts them, or each in tensors of its own, which are
numbered. Everything that differs by family is asked of its descriptor (:mod:`moesaic.models.families`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models.architecture import AXES, Architecture, Block
from moesaic.models.families import FAMILIES
from moesaic.models.families.family import Family, ModelShape, TensorSpec, bf16

BF16_BYTES = 2
COMPARED_LOGITS = 2**22
"""Next-token logits of each model that are compared at once."""
EXPERT_TOKENS = 16_384
"""Tokens that a GPU takes through a layer's experts at once; more would only take more memory."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYER_TYPES = ("full_attention", "sliding_attention")
_EXPERTS = ".mlp.experts."
_ROUTERS = tuple({f".{family.router}." for family in FAMILIES.values()})
_NUMBERED = re.compile(r"(.*\.mlp\.experts\.)(\d+)(\..*)")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config is of.

    Raises:
        ArtifactError: if it is of none.
    """
    family = FAMILIES.get(str(kind := config.get("model_type")))
    if family is None:
        raise ArtifactError(f"model_type is {kind!r}; Moesaic reads {', '.join(map(repr, FAMILIES))} checkpoints")
    return family


def read_config(config: Mapping[str, Any]) -> tuple[ModelShape, Architecture]:
    """Sizes and layout out of a resolved config (:mod:`moesaic.models.resolved_config`).

    Raises:
        ArtifactError: for a block that the family cannot have.
    """
    family = family_of(config)
    shape = ModelShape(
        family,
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        own=family.own_sizes(config),
    )
    is_child = config["model_type"] == family.child_type
    entries = config["block_configs"] if is_child else _parent_entries(config, family)
    architecture = Architecture.of(_read_block(layer, entry) for layer, entry in enumerate(entries))
    _check_dense(config, architecture, family)
    return shape, architecture


def _first_dense(config: Mapping[str, Any], family: Family) -> int:
    """How many first layers have no experts."""
    return int(config[family.first_dense_key]) if family.first_dense_key else 0


def _check_dense(config: Mapping[str, Any], architecture: Architecture, family: Family) -> None:
    first = _first_dense(config, family)
    for layer, block in enumerate(architecture.blocks):
        if block.is_dense != (layer < first):
            raise ArtifactError(
                f"layer {layer} has {block.num_experts} experts; by this config the first {first} layers have none, "
                "and all others have some"
            )
    if config["model_type"] == family.parent_type and not architecture.num_experts:
        raise ArtifactError("no layer has experts; Moesaic needs a mixture-of-experts model")


def _parent_entries(config: Mapping[str, Any], family: Family) -> list[dict[str, Any]]:
    """A parent's layers as ``block_configs`` would spell them: alike but for the windows."""
    window, sliding = config.get("sliding_window"), "sliding_attention"
    kinds = config.get("layer_types") or [LAYER_TYPES[window is not None]] * config["num_hidden_layers"]
    if window is None and sliding in kinds:
        raise ArtifactError(f"layer_types has {sliding}, but sliding_window is null; it must be at least 2 tokens")
    alike = {axis.key: config[family.config_key(name)] for name, axis in AXES.items() if axis.of_experts}
    first = _first_dense(config, family)
    no_experts = {axis.key: 0 for axis in AXES.values() if axis.of_experts}
    return [
        alike | (no_experts if layer < first else {}) | {"sliding_window": window if kind == sliding else None}
        for layer, kind in enumerate(kinds)
    ]


def _read_block(layer: int, entry: Mapping[str, Any]) -> Block:
    try:
        return Block.from_config(entry)
    except ConfigError as wrong:
        raise ArtifactError(f"layer {layer}: {wrong}") from wrong


def child_config(
    parent: Mapping[str, Any], architecture: Architecture, yarn_factor: float | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a child: its parent's resolved one, with its blocks and the class that reads them.

    The blocks stand there as ``block_configs`` and, in some families, as transformers' own ``per_layer_config``.

    RoPE stands there in both spellings: engines of transformers 4's age read ``rope_theta`` and ``rope_scaling`` only
    and fall back to wrong defaults without a word. Both get ``yarn_factor``, if it is given.

    Raises:
        ConfigError: for a ``yarn_factor`` where RoPE has none.
    """
    family = family_of(parent)
    if yarn_factor is not None:
        if (kind := parent["rope_parameters"]["rope_type"]) != "yarn":
            raise ConfigError(f"yarn_factor is {yarn_factor:g}, but RoPE of this parent is {kind!r}; leave it unset")
        places = ("rope_scaling", "rope_parameters")
        parent = dict(parent) | {place: {**parent[place], "factor": yarn_factor} for place in places}
    entries = [block.as_config() for block in architecture.blocks]
    spelt = {
        "per_layer_config": {str(layer): entry for layer, entry in enumerate(entries)},
        "layer_types": [LAYER_TYPES[block.window is not None] for block in architecture.blocks],
    }
    return (
        dict(parent)
        | {
            "model_type": family.child_type,
            "architectures": [family.child_class],
            "auto_map": {
                "AutoConfig": f"configuration_{family.child_type}.{family.prefix}PuzzleConfig",
                "AutoModelForCausalLM": f"modeling_{family.child_type}.{family.child_class}",
            },
            "block_configs": entries,
            **(spelt if family.spells_layer_types else {}),
            "num_hidden_layers": architecture.num_layers,
        }
        | family.child_values(parent)
        | ({family.first_dense_key: _count_dense(architecture)} if family.first_dense_key else {})
        | _of_the_largest(architecture, family)
    )


def _count_dense(architecture: Architecture) -> int:
    return sum(block.is_dense for block in architecture.blocks)


def _of_the_largest(architecture: Architecture, family: Family) -> dict[str, int | None]:
    """The values that engines without blocks make room for; windows stay, as ``layer_types`` goes by them."""
    blocks = [block for block in architecture.blocks if not block.is_dense]
    numbers = [name for name, axis in AXES.items() if not axis.unlimited] if blocks else []
    return {family.config_key(name): max(getattr(block, name) for block in blocks) for name in numbers}


def layer_prefix(layer: int) -> str:
    """What every tensor name of a layer starts with."""
    return f"model.layers.{layer}."


def kv_scale_names(num_layers: int) -> list[str]:
    """Scalars that a checkpoint with a calibrated FP8 KV cache adds to its layout: K's and V's scale of each layer."""
    return [f"{layer_prefix(layer)}self_attn.{state}_scale" for layer in range(num_layers) for state in "kv"]


def is_expert_indexed(name: str) -> bool:
    """Whether a tensor is of single experts: their weights and biases, and router rows.

    The first axis counts them, unless the name does, see :func:`expert_number`.
    """
    return _EXPERTS in name or any(router in name for router in _ROUTERS)


def is_expert_weight(name: str) -> bool:
    """Whether the tensor belongs to the experts themselves, which recovery keeps frozen."""
    return _EXPERTS in name


def expert_number(name: str) -> int | None:
    """Of which expert of its layer a tensor is, if that has tensors of its own."""
    match = _NUMBERED.fullmatch(name)
    return int(match[2]) if match else None


def renumbered(name: str, expert: int) -> str:
    """The name that another expert's tensor has; the name must have a number."""
    return _NUMBERED.sub(rf"\g<1>{expert}\g<3>", name)


def trainable_names(shape: ModelShape, architecture: Architecture, groups: Iterable[str]) -> list[str]:
    """Checkpoint names of the tensors that recovery may change, by the words of ``Trainable``."""
    wanted = set(groups)
    specs = tensor_specs(shape, architecture, packed=False)
    trained = [name for name, spec in specs.items() if spec.num_parameters and not is_expert_weight(name)]
    return [name for name in trained if _group(name) in wanted]


def _group(name: str) -> str:
    """The word for what a tensor outside the experts belongs to."""
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "head"
    if is_expert_indexed(name):
        return "router"
    return "attention" if ".self_attn." in name else "feed_forward" if ".mlp." in name else "norms"


def layer_specs(shape: ModelShape, layer: int, block: Block, packed: bool = True) -> dict[str, TensorSpec]:
    """Name, dtype and shape of every tensor of one layer on disk; ``packed``: experts in MXFP4, if they can be."""
    specs = shape.family.layer_specs(shape, block, packed)
    return {layer_prefix(layer) + name: spec for name, spec in specs.items()}


def outer_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """The tensors outside the layers: embedding, final norm and (untied) output head."""
    table = bf16(shape.vocab_size, shape.hidden_size)
    return {EMBEDDING: table, FINAL_NORM: bf16(shape.hidden_size), HEAD: table}


def tensor_specs(shape: ModelShape, architecture: Architecture, packed: bool = True) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint. Sizes of models follow from this table; nothing is allocated."""
    specs = outer_specs(shape)
    for layer, block in enumerate(architecture.blocks):
        specs |= layer_specs(shape, layer, block, packed)
    return specs


def num_parameters(shape: ModelShape, architecture: Architecture) -> int:
    """Parameters of the model."""
    return sum(spec.num_parameters for spec in tensor_specs(shape, architecture, packed=False).values())


def num_bytes(shape: ModelShape, architecture: Architecture, packed: bool = True) -> int:
    """Bytes of the checkpoint's tensors."""
    return sum(spec.num_bytes for spec in tensor_specs(shape, architecture, packed).values())

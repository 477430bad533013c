"""Facts of the GLM-4.5 family: sizes, tensor names, layouts on disk.

Sources: GLM-4.5's ``config.json`` files and transformers' ``glm4_moe``. The first layers are dense; all others have
experts with three tensors of their own each, in BF16, and a shared expert that every token takes. RoPE turns half of
each head. Experts are chosen by the sigmoid of a logit plus a correction in float32, and weighted by the sigmoids
alone, divided by their sum and multiplied by ``routed_scaling_factor``. Choosing among groups of experts (``n_group``
above 1) is refused: pruning counts experts of a whole layer. What a child keeps as it is: dense layers, and the shared
expert, whose width ``shared_expert_intermediate_size`` of its config says where routed experts are narrower.

The layer behind the last that predicts a second token (``num_nextn_predict_layers``) is not used, as transformers does
not use it: it was trained on the parent's states, and a child does not have it.
"""

from collections.abc import Mapping
from typing import Any

from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import (
    Family,
    ModelShape,
    Published,
    TensorSpec,
    bf16,
    norm_specs,
    projection_specs,
)


def _own_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        "dense_width": config["intermediate_size"],
        "shared_width": _shared_width(config),
        "has_bias": config["attention_bias"],
        "has_norms": config["use_qk_norm"],
    }


def _shared_width(config: Mapping[str, Any]) -> int:
    parents: int = config["n_shared_experts"] * config["moe_intermediate_size"]
    return int(config.get("shared_expert_intermediate_size") or parents)


def _child_values(parent: Mapping[str, Any]) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": _shared_width(parent), "num_nextn_predict_layers": 0}


def _layer_specs(shape: ModelShape, block: Block, packed: bool) -> dict[str, TensorSpec]:
    hidden, projections = shape.hidden_size, projection_specs(shape)
    specs = norm_specs(shape) | projections
    if shape.own["has_bias"]:
        names = [f"self_attn.{name}_proj" for name in "qkv"]
        specs |= {f"{name}.bias": bf16(projections[f"{name}.weight"].shape[0]) for name in names}
    if shape.own["has_norms"]:
        specs |= {f"self_attn.{name}_norm.weight": bf16(shape.head_dim) for name in "qk"}
    if block.is_dense:
        return specs | _gated_specs("mlp", shape.own["dense_width"], hidden)
    specs["mlp.gate.weight"] = bf16(block.num_experts, hidden)
    specs["mlp.gate.e_score_correction_bias"] = TensorSpec("F32", (block.num_experts,), 0)
    specs |= _gated_specs("mlp.shared_experts", shape.own["shared_width"], hidden)
    for expert in range(block.num_experts):
        specs |= _gated_specs(f"mlp.experts.{expert}", block.expert_width, hidden)
    return specs


def _gated_specs(name: str, width: int, hidden: int) -> dict[str, TensorSpec]:
    """A feed-forward network with a gate."""
    into = {f"{name}.{part}_proj.weight": bf16(width, hidden) for part in ("gate", "up")}
    return into | {f"{name}.down_proj.weight": bf16(hidden, width)}


def _example_config(shape: ModelShape, architecture: Architecture) -> dict[str, Any]:
    """The original's, with these sizes; stop and padding ids stay inside the vocabulary."""
    block, last = architecture.blocks[-1], min(shape.vocab_size - 1, 151_338)
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.5}
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": shape.own["has_bias"],
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": last,
        "first_k_dense_replace": sum(block.is_dense for block in architecture.blocks),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.own["dense_width"],
        "max_position_embeddings": shape.max_positions,
        "model_type": "glm4_moe",
        "moe_intermediate_size": block.expert_width,
        "n_group": 1,
        "n_routed_experts": block.num_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": shape.num_heads,
        "num_experts_per_tok": block.experts_per_token,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "num_nextn_predict_layers": 0,
        "pad_token_id": min(last - 1, 151_329),
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_parameters": rope,
        "rope_scaling": None,
        "rope_theta": 1_000_000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "use_qk_norm": shape.own["has_norms"],
        "vocab_size": shape.vocab_size,
    }


GLM4_MOE = Family(
    name="GLM-4.5",
    parent_type="glm4_moe",
    prefix="Glm4Moe",
    router="mlp.gate",
    not_packed=(),
    config_keys={"num_experts": "n_routed_experts", "expert_width": "moe_intermediate_size"},
    spells_layer_types=False,
    constants={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": None,
        "sliding_window": None,
    },
    sizes=(
        "num_hidden_layers",
        "n_routed_experts",
        "n_shared_experts",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "num_experts_per_tok",
    ),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    rope_types={"default": ("rope_type", "rope_theta", "partial_rotary_factor")},
    adapters=("vllm",),
    vllm_constants={},
    norms_in_float32=False,
    layer_specs=_layer_specs,
    example_config=_example_config,
    scores="sigmoid",
    own_sizes=_own_sizes,
    first_dense_key="first_k_dense_replace",
    extra_layers_key="num_nextn_predict_layers",
    child_values=_child_values,
    has_own_layer=True,
)


def _published(
    hidden_size: int, num_dense: int, dense_width: int, has_norms: bool, with_experts: list[Block], num_shards: int
) -> Published:
    own = {
        "dense_width": dense_width,
        "shared_width": with_experts[0].expert_width,
        "has_bias": True,
        "has_norms": has_norms,
    }
    shape = ModelShape(GLM4_MOE, hidden_size, 96, 8, 128, 151_552, 131_072, own)
    return Published(shape, Architecture.of([*[Block(0, 0, 0)] * num_dense, *with_experts]), num_shards)


PUBLISHED = {
    "GLM-4.5-Air": _published(4096, 1, 10_944, False, [Block(128, 8, 1408)] * 45, 47),
    "GLM-4.5": _published(5120, 3, 12_288, True, [Block(160, 8, 1536)] * 89, 93),
}
"""Without the layer that predicts a second token."""

"""Facts of the Qwen3-MoE family: sizes, tensor names, layouts on disk.

Sources: Qwen's ``config.json`` files and transformers' ``qwen3_moe``. Every expert has three tensors of its own,
in BF16. Queries and keys are normed by head; nothing has a bias. A token's weights are a softmax over all logits,
divided by the sum over the experts chosen (``norm_topk_prob``): a softmax over the logits of these. Parents have no
windows; children may. Models with dense layers between, which the config could ask for, are refused.
"""

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


def _layer_specs(shape: ModelShape, block: Block, packed: bool) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, block.expert_width
    specs = norm_specs(shape) | projection_specs(shape)
    specs |= {f"self_attn.{name}_norm.weight": bf16(shape.head_dim) for name in "qk"}
    specs["mlp.gate.weight"] = bf16(block.num_experts, hidden)
    for expert in range(block.num_experts):
        name = f"mlp.experts.{expert}"
        specs |= {f"{name}.{part}_proj.weight": bf16(inner, hidden) for part in ("gate", "up")}
        specs[f"{name}.down_proj.weight"] = bf16(hidden, inner)
    return specs


def _example_config(shape: ModelShape, architecture: Architecture) -> dict[str, Any]:
    """The original's, with these sizes; stop and padding ids stay inside the vocabulary."""
    block, last = architecture.blocks[0], min(shape.vocab_size - 1, 151_645)
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": last,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 3 * shape.hidden_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": block.expert_width,
        "norm_topk_prob": True,
        "num_attention_heads": shape.num_heads,
        "num_experts": block.num_experts,
        "num_experts_per_tok": block.experts_per_token,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "output_router_logits": False,
        "pad_token_id": min(last - 1, 151_643),
        "rms_norm_eps": 1e-06,
        "rope_parameters": rope,
        "rope_scaling": None,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


QWEN3_MOE = Family(
    name="Qwen3-MoE",
    parent_type="qwen3_moe",
    prefix="Qwen3Moe",
    router="mlp.gate",
    not_packed=(),
    config_keys={"num_experts": "num_experts", "expert_width": "moe_intermediate_size"},
    spells_layer_types=False,
    constants={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    },
    sizes=(
        "num_hidden_layers",
        "num_experts",
        "vocab_size",
        "hidden_size",
        "moe_intermediate_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "num_experts_per_tok",
    ),
    aliases={"num_local_experts": "num_experts"},
    rope_types={"default": ("rope_type", "rope_theta")},
    adapters=("vllm",),
    vllm_constants={},
    norms_in_float32=False,
    layer_specs=_layer_specs,
    example_config=_example_config,
)


def _published(shape: ModelShape, num_layers: int, expert_width: int, num_shards: int) -> Published:
    return Published(shape, Architecture.of([Block(128, 8, expert_width)] * num_layers), num_shards)


PUBLISHED = {
    "Qwen3-30B-A3B": _published(ModelShape(QWEN3_MOE, 2048, 32, 4, 128, 151_936, 40_960), 48, 768, 16),
    "Qwen3-235B-A22B": _published(ModelShape(QWEN3_MOE, 4096, 64, 4, 128, 151_936, 40_960), 94, 1536, 118),
}

"""Facts of the gpt-oss family: sizes, tensor names, layouts on disk.

Sources: OpenAI's gpt-oss model card and the checkpoint layouts of gpt-oss-120b and gpt-oss-puzzle-88B. On disk an
expert tensor's rows are *output* features, packed in MXFP4; in memory transformers keeps the transpose. A token's
weights are a softmax over the logits of its experts; every head's attention has a learned sink.
"""

from typing import Any

from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import (
    MXFP4_BLOCK,
    Family,
    ModelShape,
    Published,
    TensorSpec,
    bf16,
    check_packable,
    norm_specs,
    projection_specs,
)

NOT_PACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
"""Everything but the experts."""
PACKED_PROJECTIONS = ("gate_up_proj", "down_proj")


def _layer_specs(shape: ModelShape, block: Block, packed: bool) -> dict[str, TensorSpec]:
    return _attention_specs(shape) | _expert_specs(shape, block, packed)


def _attention_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    specs = norm_specs(shape) | {"self_attn.sinks": bf16(shape.num_heads)}
    for name, spec in projection_specs(shape).items():
        specs |= {name: spec, f"{name.removesuffix('weight')}bias": bf16(spec.shape[0])}
    return specs


def _expert_specs(shape: ModelShape, block: Block, packed: bool) -> dict[str, TensorSpec]:
    hidden, inner, experts = shape.hidden_size, block.expert_width, block.num_experts
    if packed:
        check_packable(inner)
    specs = {"mlp.router.weight": bf16(experts, hidden), "mlp.router.bias": bf16(experts)}
    for projection, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        name = f"mlp.experts.{projection}"
        specs[f"{name}_bias"] = bf16(experts, rows)
        if packed:
            blocks = columns // MXFP4_BLOCK
            specs[f"{name}_blocks"] = TensorSpec(
                "U8", (experts, rows, blocks, MXFP4_BLOCK // 2), experts * rows * columns
            )
            specs[f"{name}_scales"] = TensorSpec("U8", (experts, rows, blocks), 0)
        else:
            specs[name] = bf16(experts, columns, rows)
    return specs


def _example_config(shape: ModelShape, architecture: Architecture) -> dict[str, Any]:
    """The original's, with these sizes; stop and padding ids stay inside the vocabulary."""
    blocks = architecture.blocks
    last = min(shape.vocab_size - 1, 200_002)
    rope = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": last,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": blocks[0].expert_width,
        "layer_types": ["full_attention" if block.window is None else "sliding_attention" for block in blocks],
        "max_position_embeddings": shape.max_positions,
        "model_type": "gpt_oss",
        "num_attention_heads": shape.num_heads,
        "num_experts_per_tok": blocks[0].experts_per_token,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": shape.num_kv_heads,
        "num_local_experts": blocks[0].num_experts,
        "output_router_logits": False,
        "pad_token_id": min(last - 1, 199_999),
        "quantization_config": {"modules_to_not_convert": list(NOT_PACKED), "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_parameters": {**rope, "rope_theta": 150_000.0},
        "rope_scaling": rope,
        "rope_theta": 150_000.0,
        "router_aux_loss_coef": 0.9,
        "sliding_window": next((block.window for block in blocks if block.window), 128),
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


GPT_OSS = Family(
    name="gpt-oss",
    parent_type="gpt_oss",
    prefix="GptOss",
    router="mlp.router",
    not_packed=NOT_PACKED,
    config_keys={},
    spells_layer_types=True,
    constants={
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "swiglu_limit": 7.0,
    },
    sizes=(
        "num_hidden_layers",
        "num_local_experts",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "num_experts_per_tok",
    ),
    aliases={"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"},
    rope_types={
        "yarn": (
            *("rope_type", "rope_theta", "factor", "original_max_position_embeddings"),
            *("beta_fast", "beta_slow", "truncate"),
        )
    },
    adapters=("vllm", "tensorrt_llm", "fp8_cache", "distill_on_gpus", "nemo_rl"),
    vllm_constants={"rms_norm_eps": 1e-5},
    norms_in_float32=True,
    layer_specs=_layer_specs,
    example_config=_example_config,
)

GPT_OSS_120B = ModelShape(GPT_OSS, 2880, 64, 8, 64, 201_088, 131_072)
GPT_OSS_120B_BLOCKS = Architecture.of(Block(128, 4, 2880, None if layer % 2 else 128) for layer in range(36))
GPT_OSS_20B = ModelShape(GPT_OSS, 2880, 64, 8, 64, 201_088, 131_072)
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

PUBLISHED = {
    "gpt-oss-120b": Published(GPT_OSS_120B, GPT_OSS_120B_BLOCKS, 15, ("gpt-oss-puzzle-88B", GPT_OSS_PUZZLE_88B_BLOCKS)),
    "gpt-oss-20b": Published(GPT_OSS_20B, GPT_OSS_20B_BLOCKS, 3),
}

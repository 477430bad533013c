"""Random checkpoints, small but stored exactly as the real ones are."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesaic.models import layout, mxfp4
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import layer_shards, write_checkpoint
from moesaic.models.families.family import ModelShape, TensorSpec
from moesaic.models.families.gpt_oss import GPT_OSS, NOT_PACKED, PACKED_PROJECTIONS

SHAPE = ModelShape(
    family=GPT_OSS,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=64,
    max_positions=512,
)
BLOCKS = Architecture.of(Block(8, 2, 64, None if layer % 2 else 8) for layer in range(4))

SPECIAL = ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
TEMPLATE = (
    "{{ '<|start|> system <|message|> Reasoning: ' + (reasoning_effort or 'medium') + ' <|end|>' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|> user <|message|> ' + m.content + ' <|end|>' }}"
    "{% else %}{% generation %}"
    "{% if m.thinking %}"
    "{{ '<|start|> assistant <|channel|> analysis <|message|> ' + m.thinking + ' <|end|>' }}{% endif %}"
    "{{ '<|start|> assistant <|channel|> final <|message|> ' + m.content + ' <|return|>' }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|> assistant' }}{% endif %}"
)


def write_parent(directory: Path) -> None:
    """A packed ``gpt_oss`` checkpoint of random weights, with tokenizer and chat template."""
    write_checkpoint(directory, parent_config(), _random_shards())
    _tokenizer().save_pretrained(directory)


def write_small(write: Callable[..., None], directory: Path) -> None:
    """A checkpoint of one of the functions below, with the same tokenizer."""
    write(
        directory,
        vocab_size=SHAPE.vocab_size,
        max_position_embeddings=SHAPE.max_positions,
        pad_token_id=0,
        eos_token_id=SPECIAL.index("<|return|>"),
    )
    _tokenizer().save_pretrained(directory)


def write_qwen3(directory: Path, **values: int) -> None:
    """Three layers of eight experts, of which a token uses two; heads are wider than the hidden size would give."""
    config = Qwen3MoeConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        norm_topk_prob=True,
        **values,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        spread = 0.5 if ".mlp.gate." in name else 0.2
        parameter.data = (1.0 if name.endswith("norm.weight") else 0.0) + spread * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(directory)


def write_glm4(directory: Path, **values: int) -> None:
    """A dense layer and two of eight experts, of which a token uses two; corrections are in float32 and matter."""
    config = Glm4MoeConfig(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention_bias=True,
        use_qk_norm=True,
        **values,
    )
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        spread = 0.5 if ".mlp.gate." in name else 0.2
        parameter.data = (1.0 if name.endswith("norm.weight") else 0.0) + spread * torch.randn_like(parameter)
    model.to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data = 0.3 * torch.randn(8)
    model.save_pretrained(directory)


def parent_config() -> dict[str, object]:
    """What the parent's ``config.json`` says."""
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    }
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": BLOCKS.num_layers,
        "num_local_experts": 8,
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": BLOCKS.blocks[0].expert_width,
        "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": SHAPE.num_kv_heads,
        "head_dim": SHAPE.head_dim,
        "vocab_size": SHAPE.vocab_size,
        "num_experts_per_tok": 2,
        "max_position_embeddings": SHAPE.max_positions,
        "sliding_window": 8,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(4)],
        "rope_theta": 10000.0,
        "rope_scaling": rope,
        "rope_parameters": {**rope, "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": SPECIAL.index("<|return|>"),
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_PACKED},
    }


def _random_shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    yield "model-outer", {name: _random(name, spec, generator) for name, spec in layout.outer_specs(SHAPE).items()}
    for layer, block in enumerate(BLOCKS.blocks):
        specs = layout.layer_specs(SHAPE, layer, block, packed=False)
        tensors: dict[str, Tensor] = {}
        for name, spec in specs.items():
            value = _random(name, spec, generator)
            if name.endswith(PACKED_PROJECTIONS):
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4.quantize(value.transpose(-1, -2))
            else:
                tensors[name] = value
        yield from layer_shards(layer, tensors)


def _random(name: str, spec: TensorSpec, generator: torch.Generator) -> Tensor:
    values = torch.randn(spec.shape, generator=generator) * (0.5 if "router" in name else 0.2)
    return (1 + values if name.endswith("norm.weight") else values).bfloat16()


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, "system", "user", "assistant", "analysis", "final", "Reasoning:", "low", "medium", "high", "?"]
    words += [f"w{index}" for index in range(SHAPE.vocab_size - len(words))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|return|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:5]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer

"""Fixtures every tier shares: a random gpt-oss checkpoint, small but stored exactly as the real one is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moesaic.models import gpt_oss, mxfp4
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, write_checkpoint

SHAPE = gpt_oss.ModelShape(
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


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed ``gpt_oss`` checkpoint of random weights, with tokenizer and chat template. Read only."""
    directory = tmp_path_factory.mktemp("models") / "tiny-parent"
    write_checkpoint(directory, parent_config(), _random_shards())
    _tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_parent: Path) -> Checkpoint:
    """The same, opened."""
    return Checkpoint.open(tiny_parent)


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
        "model_type": gpt_oss.PARENT_TYPE,
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
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": gpt_oss.NOT_PACKED},
    }


def _random_shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    yield "model-outer", {name: _random(name, spec, generator) for name, spec in gpt_oss.outer_specs(SHAPE).items()}
    for layer, block in enumerate(BLOCKS.blocks):
        specs = gpt_oss.layer_specs(SHAPE, layer, block, packed=False)
        tensors: dict[str, Tensor] = {}
        for name, spec in specs.items():
            value = _random(name, spec, generator)
            if name.endswith(gpt_oss.PACKED_PROJECTIONS):
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4.quantize(value.transpose(-1, -2))
            else:
                tensors[name] = value
        yield from layer_shards(layer, tensors)


def _random(name: str, spec: gpt_oss.TensorSpec, generator: torch.Generator) -> Tensor:
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

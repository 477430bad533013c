"""The tiny reasoner's architecture: a real gpt-oss configuration, only small."""

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from examples.tiny_reasoner import fast_layers
from examples.tiny_reasoner.vocabulary import SPECIAL, words

WINDOW = 32


def reasoner_config(num_layers: int = 8, hidden: int = 128, num_experts: int = 16, top_k: int = 2) -> GptOssConfig:
    """8 layers of 16 experts, unless said otherwise; even layers see 32 tokens, odd layers everything."""
    pad_id, return_id = SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|return|>")
    return GptOssConfig(
        vocab_size=len(words()), hidden_size=hidden, intermediate_size=64, num_hidden_layers=num_layers, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=num_experts, num_experts_per_tok=top_k,
        sliding_window=WINDOW, max_position_embeddings=4096,
        swiglu_limit=7.0, initializer_range=0.04, tie_word_embeddings=False,
        attention_bias=True, attention_dropout=0.0, rms_norm_eps=1e-5, router_aux_loss_coef=0.0,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 512,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
        pad_token_id=pad_id, bos_token_id=pad_id, eos_token_id=return_id,
    )  # fmt: skip


def build_model(config: GptOssConfig, seed: int, device: str) -> GptOssForCausalLM:
    """Freshly initialised, in float32, with the layers that know packed rows."""
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config).to(device)
    use_fast_layers(model)
    return model


def use_fast_layers(model: GptOssForCausalLM) -> None:
    """Switch to the training functions: right-padded rows, no cache."""
    fast_layers.register()
    model.set_attn_implementation(fast_layers.NAME)
    model.set_experts_implementation(fast_layers.NAME)


def use_reference_layers(model: GptOssForCausalLM) -> None:
    """Switch to transformers' own functions: left padding and caches, as generation needs."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")

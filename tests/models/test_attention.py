"""The bounded attention: equal to transformers' eager attention, in values, gradients and decoding."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig, GptOssForCausalLM

from moesaic.models import attention
from tests.closeness import assert_near

WINDOW = 5
GRADIENT = 1e-6
"""Of the largest value: 8 steps of float32, in which norms and rotations stay while all else is float64."""


def make_model(implementation: str) -> GptOssForCausalLM:
    attention.register()
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, hidden_size=32, intermediate_size=16,
        vocab_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, attn_implementation=implementation,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


def random_tokens(rows: int, time: int) -> Tensor:
    return torch.randint(2, 40, (rows, time), generator=torch.Generator().manual_seed(1))


def padding(rows: int, time: int, side: str) -> Tensor:
    """Row r has r * 9 padding tokens."""
    mask = torch.ones(rows, time, dtype=torch.long)
    for row in range(1, rows):
        pads = slice(time - 9 * row, None) if side == "right" else slice(0, 9 * row)
        mask[row, pads] = 0
    return mask


def test_a_sink_of_logit_zero_counts_like_one_key_of_logit_zero():
    one = torch.ones(1, 1, 1, 2)
    output = attention.sink_attention(torch.zeros_like(one), one, one, torch.zeros(1), scale=1.0)
    assert torch.allclose(output, torch.full_like(one, 0.5))


def test_weights_of_a_window_by_hand():
    """Keys of logits 9, 1, 2 and values 100, 10, 20; a window of 2 hides the first; the sink's logit is 0."""
    key = torch.tensor([9.0, 1.0, 2.0]).view(1, 1, 3, 1)
    value = torch.tensor([100.0, 10.0, 20.0]).view(1, 1, 3, 1)
    output = attention.sink_attention(torch.ones(1, 1, 3, 1), key, value, torch.zeros(1), scale=1.0, window=2)
    expected = (10 * math.e + 20 * math.e**2) / (1 + math.e + math.e**2)
    assert output[0, 0, 2, 0].item() == pytest.approx(
        expected, rel=2e-6
    )  # sums of 3 terms and exp, whose last digits differ


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_equals_eager_on_every_token(side: str):
    tokens = random_tokens(3, 150)
    mask = None if side == "none" else padding(3, 150, side)
    with torch.no_grad():
        expected = make_model("eager")(tokens, attention_mask=mask).logits
        found = make_model(attention.NAME)(tokens, attention_mask=mask).logits
    real = torch.ones(3, 150, dtype=torch.bool) if mask is None else mask.bool()
    assert expected[real].abs().max() > 1
    assert_near(found[real], expected[real])


def test_documents_packed_into_a_row_do_not_see_each_other():
    """Three documents of 70, 3 and 40 tokens in one row compute what each computes alone."""
    model, tokens, lengths = make_model(attention.NAME), random_tokens(1, 113), (70, 3, 40)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits[0]
        alone = [model(document).logits[0] for document in tokens.split(lengths, dim=1)]
        mixed = model(tokens).logits[0]
    assert_near(packed, torch.cat(alone))
    assert (mixed[70:] - packed[70:]).abs().max() > 0.1


def test_gradients_equal_eager():
    tokens, mask = random_tokens(2, 70), padding(2, 70, "right")
    gradients = []
    for implementation in ("eager", attention.NAME):
        model = make_model(implementation).double()
        model.set_experts_implementation("eager")  # the default has no float64 kernel
        (model(tokens, attention_mask=mask).logits.tanh() * mask.unsqueeze(-1)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["model.layers.0.self_attn.sinks"].abs().max() > 0
    for name, expected in gradients[0].items():
        assert_near(gradients[1][name], expected, GRADIENT, name)


def test_cached_decoding_equals_recomputing():
    """The window layer's cache forgets what is behind it; 20 tokens are 4 windows."""
    model, tokens, mask = make_model(attention.NAME), random_tokens(3, 20), padding(3, 20, "left")
    mask[2, :12] = 0
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        step = model(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True)
        parts = [step.logits]
        for last in range(12, 20):
            step = model(
                tokens[:, last : last + 1], attention_mask=mask[:, : last + 1], past_key_values=step.past_key_values
            )
            parts.append(step.logits)
    assert_near(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("window", [None, 32])
def test_memory_does_not_grow_with_the_square_of_the_length(window: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(attention._LOGITS, "cpu", 2**15)
    query, key = torch.randn(2, 4, 2048, 8), torch.randn(2, 2, 2048, 8)
    with LargestTensor() as largest:
        attention.sink_attention(query, key, key, torch.zeros(4), 0.3, window)
    assert query.numel() <= largest.elements <= max(query.numel(), 16 * 4 * 2048)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_chunk_sizes_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 90, 8, generator=generator) for heads in (4, 2, 2))
    is_token = padding(3, 90, "left").bool()
    arguments = (query, key, value, torch.randn(4, generator=generator), 0.3, window, is_token)
    expected = attention.sink_attention(*arguments)
    monkeypatch.setitem(attention._LOGITS, "cpu", 1)
    assert_near(attention.sink_attention(*arguments), expected, 1e-6)  # 8 steps of float32 for sums of 90 terms


def test_refuses_what_it_would_get_wrong():
    with pytest.raises(ValueError, match="static"):
        attention.padding_mask(1, q_length=1, kv_length=64, q_offset=10)
    empty = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="dropout"):
        attention.attention_forward(torch.nn.Module(), empty, empty, empty, None, scaling=1.0, dropout=0.1)

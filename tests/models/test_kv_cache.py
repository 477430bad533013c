"""Scales and rounding by hand and against all 256 codes; the emulated cache against attention over rounded states."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from moesaic.models import attention, kv_cache, layers, loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import Decoding, Sampling, generate
from moesaic.models.kv_cache import E4M3, UNIT, KvScales, fold, next_power_of_two, quantize, scale_of
from moesaic.models.whole_model import load_model
from tests.closeness import assert_near

SCALES = [KvScales(0.03, 0.7), KvScales(0.11, 0.002), KvScales(1.5, 0.04), KvScales(0.02, 0.05)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_scales_by_hand() -> None:
    assert KvScales.of_amax(896.0, 0.0) == KvScales(2.0, 1.0)
    assert scale_of(4.48) == pytest.approx(0.01)
    assert [next_power_of_two(scale) for scale in (0.3, 0.5, 0.51, 1, 3)] == [0.5, 0.5, 1, 1, 4]
    assert KvScales.of_amax(1344.0, 100.0, power_of_two=True) == KvScales(4.0, 0.25)


def test_rounding_by_hand() -> None:
    """Three bits of mantissa: steps of 2 from 16 to 32, ties to even; the smallest number is 2^-9."""
    values = torch.tensor([447.0, -1e6, 17.0, 19.0, 2**-9, 2**-11])
    assert quantize(values, 1.0).tolist() == [448, -448, 16, 20, 2**-9, 0]
    assert quantize(torch.tensor([1000.0, 34.0]), 2.0).tolist() == [896, 32]


def test_rounding_takes_the_nearest_of_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    codes = codes[codes.isfinite()] * 0.37
    values = draw(2000) * torch.logspace(-4, 2.5, 2000)
    rounded = quantize(values, 0.37)
    nearest = (values.unsqueeze(1) - codes).abs().min(dim=1).values
    # A quotient and a product round by half a step of float32 each, measured against the value.
    assert ((rounded - values).abs() - nearest <= 2**-22 * values.abs()).all()
    assert (values.abs() > 448 * 0.37).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-4, 71.0])
def test_rounding_again_changes_nothing(dtype: torch.dtype, scale: float) -> None:
    once = quantize((draw(5000) * 100 * scale).to(dtype), scale)
    assert once.dtype == dtype
    assert torch.equal(quantize(once, scale), once)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_under_its_scale_the_largest_magnitude_does_not_saturate(power_of_two: bool) -> None:
    states = draw(3000) * 5000
    amax = float(states.abs().max())
    scale = KvScales.of_amax(amax, amax, power_of_two).key
    error = (quantize(states, scale) - states).abs()
    assert (error <= states.abs().clamp_min(scale * 2**-6) * 2**-4).all()
    assert (quantize(states, 1.0).abs() == 448).float().mean() > 0.9


@pytest.mark.parametrize("layer", [0, 1])
def test_folding_is_exact(tiny_checkpoint: Checkpoint, layer: int) -> None:
    """In float32 the attention's output keeps every bit, in a window layer and in a full one; so do BF16 weights."""
    scales = KvScales(0.25, 16.0)
    names = [name for name in tiny_checkpoint.layer_names(layer) if ".self_attn." in name]
    folded = fold({name: tiny_checkpoint.tensor(name) for name in names}, layer, scales)
    assert not any("sinks" in name or "o_proj.bias" in name for name in folded)
    back = fold(folded, layer, KvScales(1 / scales.key, 1 / scales.value))
    assert all(torch.equal(tensor, tiny_checkpoint.tensor(name)) for name, tensor in back.items())

    block = loading.load_block(tiny_checkpoint, layer)
    hidden, rotary = draw(2, 30, 64), loading.rotary(tiny_checkpoint, 30)
    window = tiny_checkpoint.architecture.blocks[layer].window
    before, stored = layers.attend(block, hidden, rotary, window), block.self_attn.k_proj(hidden)
    state = {name.split(f"layers.{layer}.")[1]: tensor.float() for name, tensor in folded.items()}
    block.load_state_dict(state, strict=False)
    assert torch.equal(layers.attend(block, hidden, rotary, window), before)
    assert torch.equal(block.self_attn.k_proj(hidden), stored / scales.key)


def test_folding_refuses_scales_that_would_round_weights() -> None:
    with pytest.raises(AssertionError, match="powers of two"):
        fold({}, 0, KvScales(0.3, 1.0))


@pytest.fixture
def model(tiny_parent: Path) -> PreTrainedModel:
    return load_model(tiny_parent)


@pytest.fixture
def oracle(tiny_parent: Path) -> PreTrainedModel:
    """The model with no cache at all, whose attention rounds all keys and values each time it reads them."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = SCALES[module.layer_idx]
        key, value = quantize(key, scale.key), quantize(value, scale.value)
        return attention.attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("rounded", attend)
    AttentionMaskInterface.register("rounded", attention.padding_mask)
    model = _exact(load_model(tiny_parent))
    model.set_attn_implementation("rounded")
    return model


def _exact(model: PreTrainedModel) -> PreTrainedModel:
    """In float64, so that noise never decides which way a state is rounded; grouped_mm has no float64 kernel."""
    model.set_experts_implementation("eager")
    return model.double()


@torch.inference_mode()
def test_prefill_and_decoding_attend_over_rounded_states(model: PreTrainedModel, oracle: PreTrainedModel) -> None:
    """Prompts of 20 and 13 tokens and twelve more, over window layers (8) and full ones, with a row dropped midway."""
    kv_cache.emulate(_exact(model), kv_cache.roundings("fp8", SCALES))
    prompts = [list(range(6, 26)), list(range(30, 43))]
    decoding = Decoding(model, prompts)
    for step in range(12):
        for place, prompt in enumerate(prompts):
            expected = oracle(torch.tensor([prompt]), use_cache=False).logits[0, -1]
            assert_near(decoding.logits[place], expected, 1e-6)  # in float64 but for norms and rotations
        if step == 6:
            decoding.keep([1])
            prompts = prompts[1:]
        decoding.step(torch.full((len(prompts),), 20 + step))
        prompts = [[*prompt, 20 + step] for prompt in prompts]


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "error"), [("bf16", 2**-8), ("fp8_unit", 2**-4)])
def test_what_is_stored_is_rounded(model: PreTrainedModel, kind: str, error: float) -> None:
    ids = torch.arange(6, 36).unsqueeze(0)
    exact = model(ids, use_cache=True).past_key_values
    rounding = kv_cache.roundings(kind, [UNIT] * 4)
    handles = kv_cache.emulate(model, rounding)
    stored = model(ids, use_cache=True).past_key_values
    for layer, before in zip(stored.layers, exact.layers, strict=True):
        assert torch.equal(rounding[0][0](layer.keys), layer.keys)
        assert torch.equal(rounding[0][1](layer.values), layer.values)
        assert not torch.equal(layer.keys, before.keys)
    first, before = stored.layers[0], exact.layers[0]
    assert ((first.keys - before.keys).abs() <= before.keys.abs() * error + 2**-10).all()
    for handle in handles:
        handle.remove()
    assert torch.equal(model(ids, use_cache=True).past_key_values.layers[0].keys, before.keys)


def test_generate_uses_the_rounded_cache(model: PreTrainedModel) -> None:
    """A cache that rounds everything to zero makes the model blind; the tokens must show it."""
    prompts, sampling = [list(range(6, 26)), list(range(26, 40))], Sampling(6, frozenset())
    sighted = generate(model, prompts, sampling, 2)
    kv_cache.emulate(model, [(torch.zeros_like, torch.zeros_like)] * 4)
    assert generate(model, prompts, sampling, 2) != sighted


def test_scale_tensors_are_named_as_engines_read_them() -> None:
    tensors = kv_cache.scale_tensors(SCALES)
    assert len(tensors) == 8
    assert tensors["model.layers.1.self_attn.v_scale"].item() == pytest.approx(0.002)
    assert all(tensor.shape == () and tensor.dtype == torch.float32 for tensor in tensors.values())
    assert math.isclose(tensors["model.layers.2.self_attn.k_scale"].item(), 1.5)

"""The FP8 KV cache (paper A, FP8 KV calibration): its scales, its rounding, and what folding does to the weights.

A cache element x is stored as the nearest number of the format E4M3, whose largest is 448, in units of a scale::

    scale = amax / 448,    stored = e4m3(clamp(x / scale, -448, 448)),    read = scale * stored

Each layer has two scales, one for K after RoPE (what a cache stores) and one for V; ``amax`` is the largest magnitude
seen in calibration. E4M3 has relative precision over its whole range, so that scales matter where |x| exceeds 448 or
is far below 2^-6; elsewhere a scale of 1 is as good. Sinks are logits, not elements of the cache: never quantised.

*Folding* serves engines that ignore scales: ``W_k, b_k /= s_k; W_q, b_q *= s_k; W_v, b_v /= s_v; W_o *= s_v``. RoPE
turns K and Q linearly, so scalars pass through it, logits q.k are what they were, and every head's output comes back
from W_o as it was. A power of two only moves exponents: folding is then exact, short of over- and underflow.
The folding, its powers of two, and queries being left unrounded are ours, not the paper's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint

E4M3 = torch.float8_e4m3fn
_BFLOAT16_BITS = 8
"""Of a number's digits, the leading one included."""
LARGEST = torch.finfo(E4M3).max
"""448."""
SHARD = "model-kv-scales"
"""The stem of the file of a checkpoint that holds the scales."""

Rounding = Callable[[Tensor], Tensor]
"""From a state as computed to the same state as the cache gives it back."""


@dataclass(frozen=True)
class KvScales:
    """What one unit of a stored element stands for, in one layer."""

    key: float
    value: float

    @classmethod
    def of_amax(cls, key: float, value: float, power_of_two: bool = False) -> "KvScales":
        """Scales under which the largest magnitudes are just representable, in BF16, as engines hold them."""
        round_up = next_power_of_two if power_of_two else next_bfloat16
        return cls(round_up(scale_of(key)), round_up(scale_of(value)))


UNIT = KvScales(1.0, 1.0)


def scale_of(amax: float) -> float:
    """``amax / 448``; 1 where everything was zero, which any scale represents."""
    return amax / LARGEST if amax else 1.0


def next_bfloat16(scale: float) -> float:
    """The smallest number that BF16 represents and that is not below a positive scale."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(mantissa * 2**_BFLOAT16_BITS), exponent - _BFLOAT16_BITS)


def next_power_of_two(scale: float) -> float:
    """The smallest power of two that is not below a positive scale: rounding up, nothing saturates."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))


def quantize(states: Float[Tensor, "*axes"], scale: float, toward_zero: bool = False) -> Float[Tensor, "*axes"]:
    """What an FP8 cache gives back; computed in float32, returned in the dtype that came. Again: no further change.

    Args:
        states: K or V.
        scale: what one unit of a stored element stands for.
        toward_zero: round so, as vLLM 0.32 does on CPUs; else to the nearest, as GPUs do.
    """
    exact = (states.float() / scale).clamp(-LARGEST, LARGEST)
    stored = exact.to(E4M3)
    if toward_zero:
        bits = stored.view(torch.uint8)
        stored = torch.where(stored.float().abs() > exact.abs(), bits - 1, bits).view(E4M3)
    return (stored.float() * scale).to(states.dtype)


def to_bfloat16(states: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """What a BF16 cache gives back."""
    return states.bfloat16().to(states.dtype)


def scale_tensors(scales: Sequence[KvScales]) -> dict[str, Float[Tensor, ""]]:
    """All layers' scales as float32 scalars, as a checkpoint holds them."""
    values = [value for scale in scales for value in (scale.key, scale.value)]
    return dict(zip(layout.kv_scale_names(len(scales)), map(torch.tensor, values), strict=True))


def read_scales(checkpoint: Checkpoint) -> list[KvScales]:
    """The scales that ``calibrate_kv`` wrote into a checkpoint.

    Raises:
        ConfigError: if it has none.
        ArtifactError: if one is not a positive number.
    """
    values = []
    for name in layout.kv_scale_names(checkpoint.num_layers):
        if name not in checkpoint.files:
            raise ConfigError(
                f"{checkpoint.directory} has no {name}; run calibrate_kv on it, or choose fp8_unit or bf16"
            )
        scale = checkpoint.tensor(name)
        if scale.numel() != 1 or not 0 < float(scale) < math.inf:
            raise ArtifactError(f"{checkpoint.directory}: {name} is {scale}; a scale is one positive number")
        values.append(float(scale))
    return [KvScales(*pair) for pair in zip(values[::2], values[1::2], strict=True)]


def scales_for(kind: str | None, checkpoint: Checkpoint) -> list[KvScales]:
    """The scales that a cache of this kind has on a checkpoint: its own if they are calibrated, else 1.

    Raises:
        ConfigError: if there should be calibrated scales and are none.
        ArtifactError: if one is not a positive number.
    """
    return read_scales(checkpoint) if kind == "fp8" else [UNIT] * checkpoint.num_layers


def fold(tensors: Mapping[str, Tensor], layer: int, scales: KvScales) -> dict[str, Tensor]:
    """The attention tensors of a layer that its scales change, by name, such that a cache with scales of 1 serves.

    Args:
        tensors: at least the layer's attention tensors, named as in a checkpoint.
        layer: which layer that is.
        scales: powers of two; others would round the weights.
    """
    assert all(next_power_of_two(scale) == scale for scale in (scales.key, scales.value)), "fold needs powers of two"
    factors = {
        "k_proj.weight": 1 / scales.key,
        "k_proj.bias": 1 / scales.key,
        "q_proj.weight": scales.key,
        "q_proj.bias": scales.key,
        "v_proj.weight": 1 / scales.value,
        "v_proj.bias": 1 / scales.value,
        "o_proj.weight": scales.value,
    }
    prefix = f"{layout.layer_prefix(layer)}self_attn."
    return {prefix + name: tensors[prefix + name] * factor for name, factor in factors.items()}


def fold_checkpoint(checkpoint: Checkpoint, scales: Sequence[KvScales]) -> dict[str, Tensor]:
    """The attention tensors of all layers that folding changes, by name; nothing for layers whose scales are 1.

    Args:
        checkpoint: of as many layers as there are scales.
        scales: powers of two.

    Raises:
        StageError: if a weight is so small or so large that its type cannot hold it once it is scaled.
    """
    folded: dict[str, Tensor] = {}
    for layer, scale in enumerate(scales):
        if scale == UNIT:
            continue
        names = [name for name in checkpoint.layer_names(layer) if ".self_attn." in name]
        tensors = {name: checkpoint.tensor(name) for name in names}
        changed = fold(tensors, layer, scale)
        back = fold(changed, layer, KvScales(1 / scale.key, 1 / scale.value))
        if lost := [name for name, tensor in back.items() if not torch.equal(tensor, tensors[name])]:
            raise StageError(f"{lost[0]}: scaling it by {scale} loses bits; use a cache of unit scales or BF16")
        folded |= changed
    return folded


def roundings(kind: str, scales: Sequence[KvScales], toward_zero: bool = False) -> list[tuple[Rounding, Rounding]]:
    """Per layer what ``EmulatedCache`` means for K and for V; ``toward_zero`` as for :func:`quantize`."""
    if kind == "bf16":
        return [(to_bfloat16, to_bfloat16)] * len(scales)
    used = scales if kind == "fp8" else [UNIT] * len(scales)
    return [(_fp8(layer.key, toward_zero), _fp8(layer.value, toward_zero)) for layer in used]


def _fp8(scale: float, toward_zero: bool) -> Rounding:
    return lambda states: quantize(states, scale, toward_zero)


def emulate(model: PreTrainedModel, layers: Sequence[tuple[Rounding, Rounding]]) -> list[RemovableHandle]:
    """From now on round what the model's layers store in any KV cache; removing the handles ends it.

    Attention reads what the cache stores, in decoding and in reading the prompt. Engines may attend over a prompt
    before it is rounded, and then round a little less. Without a cache (``use_cache=False``) nothing is rounded.
    """
    attentions = [layer.self_attn for layer in model.model.layers]
    return [
        attention.register_forward_pre_hook(_storing_rounded(*layer), with_kwargs=True)
        for attention, layer in zip(attentions, layers, strict=True)
    ]


def _storing_rounded(
    key: Rounding, value: Rounding
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        return args, kwargs if cache is None else kwargs | {"past_key_values": _RoundedStore(cache, key, value)}

    return hook


@dataclass(frozen=True)
class _RoundedStore:
    """A cache as one attention layer sees it: new states are rounded once, on their way in."""

    cache: Cache
    key: Rounding
    value: Rounding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the rounded states and return all that the layer may see."""
        stored: tuple[Tensor, Tensor] = self.cache.update(
            self.key(key_states), self.value(value_states), *args, **kwargs
        )
        return stored

"""Random checkpoints with exactly the names, shapes and packing of published models, at any size.

What reads, copies and costs a model needs its layout and its bytes, not its knowledge. Such a checkpoint is valid: any
byte is two MXFP4 codes, scales keep weights near ``1 / sqrt(inputs)``, norms are near 1. It holds no tokenizer.

Tensors are written in order of their names, one after the other and each a piece at a time, so memory stays below one
tensor. Shards are as many as the original's, of about equal size, and end behind a ``_blocks`` tensor: its ``_scales``
open the next shard, as happens in the original too. A tensor's values depend on the seed and its name alone.
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.progress import track
from moesaic.models import layout
from moesaic.models.architecture import Architecture
from moesaic.models.checkpoint import appearing, write_index
from moesaic.models.families import PUBLISHED
from moesaic.models.families.family import MXFP4_BLOCK, ModelShape, TensorSpec
from moesaic.models.resolved_config import CONFIG
from moesaic.models.safetensors_files import header_of

_PIECE = 2**22
"""Values generated at once."""
_CODE_DEVIATION = math.sqrt((0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)
"""Standard deviation of an MXFP4 code drawn at random."""
_SCALE_BIAS = 127
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Model:
    """What to write: sizes, blocks, and into how many shards."""

    shape: ModelShape
    architecture: Architecture
    num_shards: int

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, by name, in the order in which they are stored."""
        return dict(sorted(layout.tensor_specs(self.shape, self.architecture, self.packed).items()))

    @property
    def packed(self) -> bool:
        """Whether its experts are in MXFP4, as their makers publish them."""
        return bool(self.shape.family.not_packed)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return layout.num_bytes(self.shape, self.architecture, self.packed)


MODELS = {name: Model(one.shape, one.architecture, one.num_shards) for name, one in PUBLISHED.items()}
"""The originals, with their numbers of shards."""


def find_model(name: str) -> Model:
    """The original of this name."""
    if name not in MODELS:
        raise ConfigError(f"there is no layout of {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name]


def scale_model(
    like: Model,
    scale: float = 1.0,
    num_layers: int | None = None,
    num_experts: int | None = None,
    num_shards: int | None = None,
) -> Model:
    """A smaller model of the same kind.

    Args:
        like: the original.
        scale: multiplies hidden size and expert width (to multiples of 32), KV heads (at least one, always 8 query
            heads of 64 each), and the vocabulary (to a multiple of 64). Bytes fall with about its square.
        num_layers: the original's if None; windows alternate as there.
        num_experts: of every layer, the original's if None; at most that many are used per token.
        num_shards: the original's if None.

    Raises:
        ConfigError: for a value out of range.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"scale {scale:g} is not above 0 and at most 1; 1 is the original's full size")
    for name, value in (("layers", num_layers), ("experts", num_experts), ("shards", num_shards)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}; at least 1 is needed")
    whole, layers = like.shape, num_layers or like.architecture.num_layers
    kv_heads = max(1, round(whole.num_kv_heads * scale))
    shape = replace(
        whole,
        hidden_size=_multiple(whole.hidden_size * scale, MXFP4_BLOCK),
        num_heads=kv_heads * (whole.num_heads // whole.num_kv_heads),
        num_kv_heads=kv_heads,
        vocab_size=_multiple(whole.vocab_size * scale, _VOCABULARY_MULTIPLE),
        own={
            key: value if isinstance(value, bool) else _multiple(value * scale, MXFP4_BLOCK)
            for key, value in whole.own.items()
        },
    )
    last = like.architecture.blocks[-1]
    experts = num_experts or last.num_experts
    used, width = min(last.experts_per_token, experts), _multiple(last.expert_width * scale, MXFP4_BLOCK)
    first = like.architecture.blocks[:layers]
    blocks = (*first, *islice(cycle(like.architecture.blocks[-2:]), layers - len(first)))
    smaller = {"num_experts": experts, "experts_per_token": used, "expert_width": width}
    scaled = Architecture.of(block if block.is_dense else replace(block, **smaller) for block in blocks)
    return Model(shape, scaled, num_shards or like.num_shards)


def _multiple(value: float, of: int) -> int:
    return max(1, round(value / of)) * of


def model_config(model: Model) -> dict[str, Any]:
    """The ``config.json``: the original's, with the model's sizes."""
    return model.shape.family.example_config(model.shape, model.architecture)


def plan_shards(model: Model) -> list[dict[str, TensorSpec]]:
    """Which tensors go into which shard; a shard that reached its share ends behind the next ``_blocks`` tensor."""
    share = model.num_bytes / model.num_shards
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in model.specs.items():
        shards[-1][name] = spec
        filled += spec.num_bytes
        if filled >= share * len(shards) and (name.endswith("_blocks") or not model.packed):
            shards.append({})
    return shards if shards[-1] else shards[:-1]


def write_synthetic(model: Model, directory: Path, seed: int = 0) -> None:
    """Write a checkpoint; ``directory`` appears only when all of it is on disk.

    Raises:
        StageError: if the disk has too little room; nothing is written then.
        ArtifactError: if the directory is not empty.
    """
    _check_room(directory, model.num_bytes)
    with appearing(directory) as partial:
        weight_map: dict[str, str] = {}
        for file, name, pieces in track(_pieces(model, seed), len(model.specs), "writing tensors"):
            with (partial / file).open("ab") as shard:
                shard.writelines(pieces)
            weight_map[name] = file
        write_index(partial, weight_map)
        (partial / CONFIG).write_text(json.dumps(model_config(model), indent=2) + "\n")


def _check_room(directory: Path, num_bytes: int) -> None:
    existing = next(folder for folder in directory.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise StageError(
            f"the checkpoint takes {num_bytes / 2**30:.1f} GiB, {existing} has {free / 2**30:.1f} GiB free; "
            "choose a smaller scale or another disk"
        )


def _pieces(model: Model, seed: int) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """For every tensor its shard's file name, its own name and its bytes; a shard's first begins with the header."""
    shards = plan_shards(model)
    for index, shard in enumerate(shards, 1):
        file, header = f"model-{index:05d}-of-{len(shards):05d}.safetensors", header_of(shard)
        for name, spec in shard.items():
            yield file, name, chain([header], random_bytes(name, spec, seed))
            header = b""


def random_bytes(name: str, spec: TensorSpec, seed: int) -> Iterator[bytes]:
    """A tensor's bytes, a piece at a time."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    remaining = math.prod(spec.shape)
    while remaining:
        count = min(remaining, _PIECE)
        remaining -= count
        if name.endswith("_blocks"):
            yield generator.bytes(count)
        elif name.endswith("_scales"):
            yield _scales(generator, count, num_inputs=spec.shape[-1] * MXFP4_BLOCK)
        else:
            values = _mean(name) + _deviation(name, spec.shape) * generator.standard_normal(count, np.float32)
            yield values.astype("<f4").tobytes() if spec.dtype == "F32" else _bfloat16(values)


def _scales(generator: np.random.Generator, count: int, num_inputs: int) -> bytes:
    """Exponents at and beside the one that gives random codes a deviation of ``1 / sqrt(num_inputs)``."""
    middle = _SCALE_BIAS + round(math.log2(1 / math.sqrt(num_inputs) / _CODE_DEVIATION))
    exponents: np.ndarray = generator.integers(middle - 1, middle + 2, count, dtype=np.uint8)
    return exponents.tobytes()


def _mean(name: str) -> float:
    return 1.0 if name.endswith("norm.weight") else 0.0


def _deviation(name: str, shape: Sequence[int]) -> float:
    """Matrices keep the size of what they are multiplied with; logits of sinks spread by one; the rest is small."""
    if name.endswith("sinks"):
        return 1.0
    if len(shape) == 2 and name.endswith("weight") and name != layout.EMBEDDING:
        return 1 / math.sqrt(shape[1])
    return 1.0 if name == layout.EMBEDDING else 0.02


def _bfloat16(values: np.ndarray) -> bytes:
    """Float32 values as little-endian bfloat16, rounded to nearest, ties to even; they must be finite."""
    bits = values.astype("<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    high: bytes = rounded.astype("<u2").tobytes()
    return high

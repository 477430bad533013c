"""Building layers from a checkpoint, one at a time: weights are read, unpacked on the device, used, and dropped."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
)

from moesaic.core.errors import ArtifactError
from moesaic.models import attention, gpt_oss, mxfp4
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import Head, Rotary

_NOT_OF_A_LAYER = (
    *("quantization_config", "auto_map", "block_configs", "per_layer_config", "architectures"),
    *("dtype", "torch_dtype"),
)


def choose_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer_config(checkpoint: Checkpoint, block: Block) -> GptOssConfig:
    """A transformers config of one layer of this shape."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_OF_A_LAYER}
    config.update(
        model_type=gpt_oss.PARENT_TYPE,
        num_hidden_layers=1,
        **block.as_config(),
        layer_types=["full_attention" if block.window is None else "sliding_attention"],
    )
    return GptOssConfig(**config)


def load_block(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> GptOssDecoderLayer:
    """Build one layer and read its weights."""
    stored = {name: checkpoint.tensor(name) for name in checkpoint.layer_names(layer)}
    return build_block(checkpoint, layer, stored, dtype, device)


def build_block(
    checkpoint: Checkpoint,
    layer: int,
    stored: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> GptOssDecoderLayer:
    """Build one layer out of its tensors as stored, unpacked on the device; norms stay in float32, as in transformers.

    ``stored`` is emptied on the way, so that a layer is not held twice.
    """
    attention.register()
    config = layer_config(checkpoint, checkpoint.architecture.blocks[layer])
    config._attn_implementation = attention.NAME
    config._experts_implementation = "eager" if torch.device(device).type == "cpu" else "grouped_mm"
    with torch.device("meta"):
        block = GptOssDecoderLayer(config, layer_idx=0)
    block.load_state_dict(unpacked_layer(layer, stored, dtype, device), assign=True)
    return block.eval().requires_grad_(False)


def unpacked_layer(
    layer: int, stored: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A layer's tensors as transformers' own layer names and holds them; ``stored`` is emptied on the way.

    Raises:
        ArtifactError: if one has a number that is not finite.
    """
    state = {}
    for name in sorted(stored):
        short = name.removeprefix(gpt_oss.layer_prefix(layer))
        if short.endswith("_blocks"):
            scales_name = f"{name.removesuffix('_blocks')}_scales"
            packed, scales = stored.pop(name), check_finite(scales_name, stored.pop(scales_name).to(device))
            rows = mxfp4.dequantize(packed.to(device), scales, dtype)
            state[short.removesuffix("_blocks")] = rows.transpose(-1, -2)  # in memory the columns are outputs
        elif name in stored:
            kept = torch.float32 if "layernorm" in short else dtype
            state[short] = check_finite(name, stored.pop(name).to(device)).to(kept)
    return state


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, of which every number is finite; of scales of MXFP4, everything that they are multiplied with.

    Raises:
        ArtifactError: that names it otherwise; its name says the layer.
    """
    if tensor.dtype == torch.uint8:
        finite = not name.endswith("_scales") or int(tensor.max()) <= mxfp4.LARGEST_SCALE
    else:
        low, high = tensor.aminmax()
        finite = bool(low.isfinite() & high.isfinite())
    if not finite:
        raise ArtifactError(f"{name} has numbers that are not finite; the weights are damaged: download them again")
    return tensor


def check_weights(checkpoint: Checkpoint) -> None:
    """Read all of a checkpoint's numbers that could fail to be finite.

    Raises:
        ArtifactError: that names the first tensor with one that is not.
    """
    for name in gpt_oss.tensor_specs(checkpoint.shape, checkpoint.architecture, checkpoint.packed):
        if not name.endswith("_blocks"):
            check_finite(name, checkpoint.stored(name).read())


def embed(checkpoint: Checkpoint, token_ids: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The states [batch time hidden] in which token ids [batch time] enter the first layer; the table is read once."""
    return list(embed_each(checkpoint, token_ids, dtype))


def embed_each(
    checkpoint: Checkpoint, token_ids: Iterable[Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Yield the states in which each batch of token ids enters the first layer, one batch at a time."""
    table = check_finite(gpt_oss.EMBEDDING, checkpoint.tensor(gpt_oss.EMBEDDING))
    for batch in token_ids:
        yield table[batch].to(dtype)


def load_head(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Head:
    """The final norm, in float32, and the output head."""
    epsilon = layer_config(checkpoint, checkpoint.architecture.blocks[0]).rms_norm_eps
    norm = GptOssRMSNorm(checkpoint.shape.hidden_size, eps=epsilon)
    scale = check_finite(gpt_oss.FINAL_NORM, checkpoint.tensor(gpt_oss.FINAL_NORM)).float()
    norm.load_state_dict({"weight": scale}, assign=True)
    weight = check_finite(gpt_oss.HEAD, checkpoint.tensor(gpt_oss.HEAD)).to(device, dtype)
    return Head(norm.to(device).requires_grad_(False), weight)


def rotary(
    checkpoint: Checkpoint, num_positions: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Rotary:
    """Cosine and sine for positions 0 to ``num_positions - 1``, which all layers share."""
    embedding = GptOssRotaryEmbedding(layer_config(checkpoint, checkpoint.architecture.blocks[0]))
    positions = torch.arange(num_positions).unsqueeze(0)
    cosine, sine = embedding(torch.empty(0, dtype=dtype), positions)
    return cosine.to(device), sine.to(device)

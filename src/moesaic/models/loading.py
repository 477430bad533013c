"""Building layers from a checkpoint, one at a time: weights are read, unpacked on the device, used, and dropped."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.core.errors import ArtifactError
from moesaic.models import attention, layout, mxfp4
from moesaic.models.architecture import AXES, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import DecoderLayer, Head, Rotary

_NOT_OF_A_LAYER = (
    *("quantization_config", "auto_map", "block_configs", "per_layer_config", "architectures"),
    *("dtype", "torch_dtype"),
)

_LARGEST = torch.finfo(torch.bfloat16).max
"""Beyond it a number is not finite in what models are computed in."""


def choose_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer_config(checkpoint: Checkpoint, block: Block) -> PreTrainedConfig:
    """A transformers config of one layer of this shape."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_OF_A_LAYER}
    family = checkpoint.shape.family
    config.update(
        {family.config_key(name): value for name, value in zip(AXES, block.values, strict=True)},
        model_type=family.parent_type,
        num_hidden_layers=1,
        layer_types=[layout.LAYER_TYPES[block.window is not None]],
    )
    if family.first_dense_key:
        config[family.first_dense_key] = int(block.is_dense)
    built: PreTrainedConfig = family.of_transformers("Config")(**config)
    built.sliding_window = block.window
    return built


def load_block(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DecoderLayer:
    """Build one layer and read its weights."""
    stored = {name: checkpoint.tensor(name) for name in checkpoint.layer_names(layer)}
    return build_block(checkpoint, layer, stored, dtype, device)


def build_block(
    checkpoint: Checkpoint,
    layer: int,
    stored: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DecoderLayer:
    """Build one layer out of its tensors as stored, unpacked on the device.

    ``stored`` is emptied on the way, so that a layer is not held twice.
    """
    attention.register()
    config = layer_config(checkpoint, checkpoint.architecture.blocks[layer])
    config._attn_implementation = attention.NAME
    config._experts_implementation = "eager" if torch.device(device).type == "cpu" else "grouped_mm"
    family = checkpoint.shape.family
    with torch.device("meta"):
        block = family.layer_class(config, layer_idx=0)
    norms = torch.float32 if family.norms_in_float32 else dtype
    block.load_state_dict(unpacked_layer(checkpoint, layer, stored, dtype, device, norms), assign=True)
    return block.eval().requires_grad_(False)


def unpacked_layer(
    checkpoint: Checkpoint,
    layer: int,
    stored: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    norms: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """A layer's tensors as transformers' own layer names and holds them; ``stored`` is emptied on the way.

    The layer's two norms are in ``norms``, if that is given, what the layout has in F32 in float32, all else in
    ``dtype``.

    Raises:
        ArtifactError: if one has a number that is not finite.
    """
    state = _stacked_experts(layer, stored, dtype, device)
    specs = layout.layer_specs(checkpoint.shape, layer, checkpoint.architecture.blocks[layer], checkpoint.packed)
    for name in sorted(stored):
        short = name.removeprefix(layout.layer_prefix(layer))
        if short.endswith("_blocks"):
            scales_name = f"{name.removesuffix('_blocks')}_scales"
            packed, scales = stored.pop(name), check_finite(scales_name, stored.pop(scales_name).to(device))
            rows = mxfp4.dequantize(packed.to(device), scales, dtype)
            state[short.removesuffix("_blocks")] = rows.transpose(-1, -2)  # in memory the columns are outputs
        elif name in stored:
            kept = torch.float32 if specs[name].dtype == "F32" else norms if norms and "layernorm" in short else dtype
            state[short] = check_finite(name, stored.pop(name).to(device)).to(kept)
    return state


def _stacked_experts(
    layer: int, stored: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Experts that have tensors of their own, as one tensor of all: rows are outputs, the gate's above those of up."""
    numbers = {name: number for name in stored if (number := layout.expert_number(name)) is not None}
    if not numbers:
        return {}
    first, experts = f"{layout.layer_prefix(layer)}mlp.experts.0.", max(numbers.values()) + 1
    inner, hidden = stored[f"{first}up_proj.weight"].shape
    rows = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner), "down_proj": (0, hidden)}
    state = {
        "mlp.experts.gate_up_proj": torch.empty(experts, 2 * inner, hidden, dtype=dtype, device=device),
        "mlp.experts.down_proj": torch.empty(experts, hidden, inner, dtype=dtype, device=device),
    }
    for name, number in numbers.items():
        part = name.split(".")[-2]
        whole = state[f"mlp.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"]
        whole[number, slice(*rows[part])] = check_finite(name, stored.pop(name).to(device)).to(dtype)
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
        finite = bool((low >= -_LARGEST) & (high <= _LARGEST))
    if not finite:
        raise ArtifactError(f"{name} has numbers that are not finite; the weights are damaged: download them again")
    return tensor


def check_weights(checkpoint: Checkpoint) -> None:
    """Read all of a checkpoint's numbers that could fail to be finite.

    Raises:
        ArtifactError: that names the first tensor with one that is not.
    """
    for name in layout.tensor_specs(checkpoint.shape, checkpoint.architecture, checkpoint.packed):
        if not name.endswith("_blocks"):
            check_finite(name, checkpoint.stored(name).read())


def embed(checkpoint: Checkpoint, token_ids: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The states [batch time hidden] in which token ids [batch time] enter the first layer; the table is read once."""
    return list(embed_each(checkpoint, token_ids, dtype))


def embed_each(
    checkpoint: Checkpoint, token_ids: Iterable[Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Yield the states in which each batch of token ids enters the first layer, one batch at a time."""
    table = check_finite(layout.EMBEDDING, checkpoint.tensor(layout.EMBEDDING))
    for batch in token_ids:
        yield table[batch].to(dtype)


def load_head(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Head:
    """The final norm, in float32, and the output head."""
    epsilon = layer_config(checkpoint, checkpoint.architecture.blocks[0]).rms_norm_eps
    norm = checkpoint.shape.family.of_transformers("RMSNorm")(checkpoint.shape.hidden_size, eps=epsilon)
    scale = check_finite(layout.FINAL_NORM, checkpoint.tensor(layout.FINAL_NORM)).float()
    norm.load_state_dict({"weight": scale}, assign=True)
    weight = check_finite(layout.HEAD, checkpoint.tensor(layout.HEAD)).to(device, dtype)
    return Head(norm.to(device).requires_grad_(False), weight)


def rotary(
    checkpoint: Checkpoint, num_positions: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Rotary:
    """Cosine and sine for positions 0 to ``num_positions - 1``, which all layers share."""
    config = layer_config(checkpoint, checkpoint.architecture.blocks[0])
    embedding = checkpoint.shape.family.of_transformers("RotaryEmbedding")(config)
    positions = torch.arange(num_positions).unsqueeze(0)
    cosine, sine = embedding(torch.empty(0, dtype=dtype), positions)
    return cosine.to(device), sine.to(device)

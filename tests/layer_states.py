"""A layer of a checkpoint, unpacked in one go: the slow and plain way, against which fast readers are tested."""

import torch
from torch import Tensor

from moesaic.models import layout, mxfp4
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.gpt_oss import PACKED_PROJECTIONS


def layer_state(checkpoint: Checkpoint, layer: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One layer in the names and layout that transformers' decoder layer loads, experts unpacked, cast to dtype."""
    prefix = layout.layer_prefix(layer)
    names = [name for name in checkpoint.layer_names(layer) if not name.endswith(("_blocks", "_scales"))]
    state = {name.removeprefix(prefix): checkpoint.tensor(name).to(dtype) for name in names}
    for projection in PACKED_PROJECTIONS if checkpoint.packed else ():
        name = f"{prefix}mlp.experts.{projection}"
        rows = mxfp4.dequantize(checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales"), dtype)
        state[f"mlp.experts.{projection}"] = rows.transpose(-1, -2).contiguous()
    return state

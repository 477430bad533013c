"""Copies of checkpoints in which a tensor has a number that it should not have."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from moesaic.models.checkpoint import Checkpoint


def damaged_copy(source: Path, copy: Path, name: str, value: float) -> Path:
    """A copy whose tensor ``name`` is ``value`` in all of its first row."""
    shutil.copytree(source, copy)
    shard = copy / Checkpoint.open(source).files[name].name
    tensors = load_file(shard)
    tensors[name][0] = value
    save_file(tensors, shard, {"format": "pt"})
    return copy

"""Read single tensors out of stored checkpoints: the header first, then the tensor's own bytes, and nothing else."""

import json
import struct
from typing import TYPE_CHECKING, Any

from moesaic.errors import ArtifactError
from moesaic.store.content import Store
from moesaic.store.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20
_FIRST_READ_BYTES = 64 * 2**10
"""Read at once: enough for the header of most shards."""


def read_tensor(store: Store, manifest: Manifest, name: str) -> "Tensor":
    """The tensor of that name from whichever safetensors file of the manifest holds it.

    Only its own bytes are read, so the object's digest cannot be checked; materialize the manifest for that.

    Raises:
        ArtifactError: if no file holds it, or its file is not safetensors.
    """
    import safetensors.torch

    for entry in _candidates(store, manifest, name):
        header, data_start = _read_header(store, entry)
        if name in header:
            found = header[name]
            begin, end = found["data_offsets"]
            content = store.read_range(entry, data_start + begin, end - begin)
            alone = json.dumps({name: found | {"data_offsets": [0, end - begin]}}).encode()
            tensor: Tensor = safetensors.torch.load(struct.pack("<Q", len(alone)) + alone + content)[name]
            return tensor
    raise ArtifactError(f"no safetensors file of manifest {manifest.id} holds a tensor {name!r}")


def _candidates(store: Store, manifest: Manifest, name: str) -> list[FileEntry]:
    """The one file that the checkpoint's index names, else all safetensors files."""
    entries = {entry.path: entry for entry in manifest.files}
    if _INDEX in entries:
        index = json.loads(store.read_range(entries[_INDEX], 0, entries[_INDEX].size_bytes))
        return [entries[path] for path in [index["weight_map"].get(name)] if path in entries]
    return [entry for path, entry in entries.items() if path.endswith(".safetensors")]


def _read_header(store: Store, entry: FileEntry) -> tuple[dict[str, Any], int]:
    """The header, and the byte at which the tensors' data begin."""
    first = store.read_range(entry, 0, min(_FIRST_READ_BYTES, entry.size_bytes))
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else entry.size_bytes
    if length > min(_MAX_HEADER_BYTES, entry.size_bytes - 8):
        raise ArtifactError(f"{entry.path} is not a safetensors file: its header would be longer than the file")
    text = first[8 : 8 + length]
    text += store.read_range(entry, 8 + len(text), length - len(text)) if len(text) < length else b""
    return json.loads(text), 8 + length

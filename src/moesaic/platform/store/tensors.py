"""Read single tensors from stored checkpoints: the header, and then only the tensor's bytes."""

from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.models.checkpoint_layout import read_weight_map
from moesaic.models.safetensors_files import find_tensors, header_of
from moesaic.platform.store.content import Store
from moesaic.platform.store.manifest import FileEntry, Manifest

_INDEX = "model.safetensors.index.json"


def read_tensor(store: Store, manifest: Manifest, name: str) -> Tensor:
    """Read one tensor from the safetensors files of a manifest.

    Only its own bytes are read, so the object's digest cannot be checked; materialize the manifest for that.

    Raises:
        ArtifactError: if no file holds it, or its file is not safetensors.
    """
    for entry in _candidates(store, manifest, name):
        tensors = find_tensors(partial(store.read_range, entry), entry.size_bytes, Path(entry.path))
        if name in tensors:
            ((start, count),) = tensors[name].runs
            content = store.read_range(entry, start, count)
            try:
                tensor: Tensor = load(header_of({name: tensors[name]}) + content)[name]
            except SafetensorError as broken:
                raise ArtifactError(f"{entry.path}: {name} is broken: {broken}") from broken
            return tensor
    raise ArtifactError(f"no safetensors file of manifest {manifest.id} holds a tensor {name!r}")


def _candidates(store: Store, manifest: Manifest, name: str) -> list[FileEntry]:
    """The one file that the checkpoint's index names, else all safetensors files."""
    entries = {entry.path: entry for entry in manifest.files}
    if _INDEX in entries:
        listed = read_weight_map(store.read_range(entries[_INDEX], 0, entries[_INDEX].size_bytes), _INDEX)
        return [entries[path] for path in [listed.get(name)] if path in entries]
    return [entry for path, entry in entries.items() if path.endswith(".safetensors")]

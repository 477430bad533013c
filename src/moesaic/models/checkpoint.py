"""Checkpoints on disk: opening one checks it whole, reading streams it, writing never shows half of it.

A checkpoint is a Hugging Face directory: ``config.json``, safetensors shards and, with several shards, their index.
Opening reads only the headers. Shards follow the method: per layer one file of experts and one of everything else, so
that a child whose experts stay frozen shares those files with its parent byte for byte.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.errors import ArtifactError, StageError
from moesaic.models import gpt_oss
from moesaic.models.architecture import Architecture
from moesaic.models.safetensors_files import StoredTensor, num_data_bytes, read_header, write_shard

Stored = TypeVar("Stored", Tensor, StoredTensor)
"""A tensor, in memory or still in its file."""

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
RECOVERY = "recovery.json"
"""The file in a checkpoint that lists what was done to it since it was pruned."""
CURVE = "training.jsonl"
"""The file beside trained weights with their training curve, a line per step."""
_OF_ONE_STAGE = ("record.json", CURVE)
"""Files beside weights that say how these very weights came about; a rewritten checkpoint has its own."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checked, read-only checkpoint. Tensors are memory-mapped and copied only when asked for."""

    directory: Path
    config: Mapping[str, Any]
    shape: gpt_oss.ModelShape
    architecture: Architecture
    packed: bool
    files: Mapping[str, Path]
    """For every tensor name the shard that holds it."""

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Open and check a checkpoint by its headers; no weight is read.

        Raises:
            ArtifactError: if something is missing, truncated, of another shape than the config says, or pickled.
        """
        config = _read_json(directory / CONFIG)
        shape, architecture = gpt_oss.read_config(config)
        files = _locate_tensors(directory)
        packed = any(name.endswith("_blocks") for name in files)
        checkpoint = cls(directory, config, shape, architecture, packed, files)
        checkpoint._check_headers()
        return checkpoint

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self.architecture.num_layers

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is on disk."""
        tensor: Tensor = self._handles[self.files[name]].get_tensor(name)
        return tensor

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; nothing of it is read, and nothing stays mapped."""
        return self._headers[self.files[name]][name]

    def shape_of(self, name: str) -> list[int]:
        """The shape of one tensor, from its header."""
        shape: list[int] = self._handles[self.files[name]].get_slice(name).get_shape()
        return shape

    def layer_names(self, layer: int) -> list[str]:
        """The names of one layer's tensors, in the order of the layout table."""
        return list(gpt_oss.layer_specs(self.shape, layer, self.architecture.blocks[layer], self.packed))

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {path: safe_open(path, framework="pt") for path in set(self.files.values())}

    @cached_property
    def _headers(self) -> dict[Path, dict[str, StoredTensor]]:
        return {path: read_header(path) for path in set(self.files.values())}

    def _check_headers(self) -> None:
        expected = gpt_oss.tensor_specs(self.shape, self.architecture, self.packed)
        missing = sorted(set(expected) - set(self.files))
        if missing:
            raise ArtifactError(f"{self.directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
        for name, spec in expected.items():
            shape = tuple(self.shape_of(name))
            if shape != spec.shape:
                raise ArtifactError(
                    f"{self.files[name].name}: {name} has shape {shape}, "
                    f"the config asks for {spec.shape}; config and weights are not of the same model"
                )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; a model is a directory with {CONFIG} and safetensors files")
    try:
        value = json.loads(path.read_text())
    except ValueError as broken:
        raise ArtifactError(f"{path} is not valid JSON: {broken}") from broken
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _locate_tensors(directory: Path) -> dict[str, Path]:
    if (directory / INDEX).is_file():
        listed = _read_json(directory / INDEX)["weight_map"]
        files = sorted(set(listed.values()))
        shards = [directory / file for file in files]
        if outside := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
            raise ArtifactError(f"{directory / INDEX} lists {outside[0]}, which is outside of the model's directory")
    else:
        listed, shards = None, sorted(directory.glob("*.safetensors"))
    if not shards:
        pickles = [path.name for pattern in _PICKLES for path in directory.glob(pattern)]
        hint = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
        raise ArtifactError(f"{directory} holds no safetensors files{hint}")
    located = {name: path for path in shards for name in _tensor_names(path)}
    absent = sorted(set(listed or ()) - set(located))
    if absent:
        raise ArtifactError(f"{directory / INDEX} lists {absent[0]}, which its shard does not hold")
    return located


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError) as broken:
        raise ArtifactError(f"{path} cannot be read as safetensors ({broken}); copy or download it again") from broken


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    shards: Iterable[tuple[str, Mapping[str, Tensor | StoredTensor]]],
    extra: Iterable[Path] = (),
) -> None:
    """Write a checkpoint shard by shard; ``directory`` appears only when all of it is on disk.

    Args:
        directory: must not exist yet, or be empty.
        config: what goes into ``config.json``.
        shards: file stem and tensors of each shard, produced lazily so that one shard is in memory at a time; tensors
            that lie in files are copied from there.
        extra: files to copy beside the weights (tokenizer, chat template, modelling code).
    """
    with appearing(directory) as partial:
        weight_map: dict[str, str] = {}
        for stem, tensors in shards:
            _save_shard(partial / f"{stem}.safetensors", tensors)
            weight_map |= dict.fromkeys(tensors, f"{stem}.safetensors")
        write_index(partial, weight_map)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def rewrite_checkpoint(
    source: Checkpoint,
    output: Path,
    replaced: Mapping[str, Tensor],
    step: Mapping[str, Any],
    added: Mapping[str, Tensor] | None = None,
    added_shard: str = "model-added",
    extra: Iterable[Path] = (),
) -> None:
    """Write a copy of a checkpoint in which some tensors are others; it appears only when it is whole.

    Shards of which nothing is replaced are the source's own bytes, and so the same objects in the store. Scales of the
    FP8 KV cache do not outlive the weights they were measured with.

    Args:
        source: what is copied, with the files beside its weights.
        output: must not exist yet, or be empty.
        replaced: tensors by name, cast to the dtype that they have on disk.
        step: what was done, appended to ``recovery.json``.
        added: further tensors, which the layout does not know; they become one shard of their own.
        added_shard: the stem of that shard's file name.
        extra: files to copy beside the weights.

    Raises:
        ArtifactError: for a name that is not in the source, an expert's tensor, or another shape.
    """
    _check_replaced(source, replaced)
    with appearing(output) as partial:
        stale = gpt_oss.kv_scale_names(source.num_layers) if replaced or added else ()
        weight_map = {name: path.name for name, path in source.files.items() if name not in stale}
        _copy_companions(source, partial, extra)
        for file in sorted(set(weight_map.values())):
            names = [name for name, holder in weight_map.items() if holder == file]
            if replaced.keys().isdisjoint(names):
                _link_or_copy(source.directory / file, partial / file)
            else:
                tensors = {name: source.tensor(name) for name in names}
                _save_shard(
                    partial / file, {n: replaced[n].to(t.dtype) if n in replaced else t for n, t in tensors.items()}
                )
        if added:
            _save_shard(partial / f"{added_shard}.safetensors", added)
            weight_map |= dict.fromkeys(added, f"{added_shard}.safetensors")
        write_index(partial, weight_map)
        (partial / CONFIG).write_text(json.dumps(source.config, indent=2) + "\n")
        (partial / RECOVERY).write_text(json.dumps([*read_recovery(source.directory), step], indent=1) + "\n")


def read_recovery(directory: Path) -> list[dict[str, Any]]:
    """What was done to a checkpoint since it was pruned, first step first."""
    path = directory / RECOVERY
    steps: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return steps


def _check_replaced(source: Checkpoint, replaced: Mapping[str, Tensor]) -> None:
    for name, tensor in replaced.items():
        if name not in source.files:
            raise ArtifactError(f"{source.directory} has no tensor {name}; only its own tensors can be replaced")
        if gpt_oss.is_expert_weight(name):
            raise ArtifactError(f"{name} belongs to the experts, which recovery keeps as they are")
        shape = tuple(source.shape_of(name))
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}; in {source.directory} it is {shape}")


def _copy_companions(source: Checkpoint, partial: Path, extra: Iterable[Path]) -> None:
    own = {path.name for path in source.files.values()} | {INDEX, CONFIG, RECOVERY, *_OF_ONE_STAGE}
    companions = [path for path in sorted(source.directory.iterdir()) if path.is_file() and path.name not in own]
    for path in (*companions, *extra):
        shutil.copyfile(path, partial / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that is not possible (another file system, a read-only store)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def layer_shards(layer: int, tensors: Mapping[str, Stored]) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Split one layer's tensors into its two shards: the experts, and everything else."""
    experts = {name: tensor for name, tensor in tensors.items() if gpt_oss.is_expert_weight(name)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in experts}
    yield f"model-layer-{layer:03d}-experts", experts
    yield f"model-layer-{layer:03d}-rest", rest


def _save_shard(path: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
    in_files = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    in_memory = {name: tensor.contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if in_files:
        write_shard(path, in_files)
    else:
        save_file(in_memory, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody else read what it writes


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    """Write which shard of the directory, all of them written already, holds which tensor."""
    total = sum(num_data_bytes(directory / file) for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A scratch directory beside ``directory`` that takes its place on success and vanishes on failure."""
    if directory.exists() and any(directory.iterdir()):
        raise ArtifactError(f"{directory} is not empty; choose another output or remove it")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        partial.rename(directory)
    except OSError as failure:
        if failure.errno == errno.ENOSPC:
            raise StageError(f"the disk that holds {directory.parent} is full; free space and run again") from failure
        raise
    except SafetensorError as failure:
        raise StageError(f"writing {directory} failed: {failure}; nothing of it was kept") from failure
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.errors import ArtifactError, MoesaicError, StageError
from moesaic.core.files import set_mode
from moesaic.core.json_text import parse_json
from moesaic.core.training_curve import CURVE
from moesaic.models import layout
from moesaic.models.architecture import Architecture
from moesaic.models.checkpoint_layout import EXPONENTS, INDEX, check_tensors, companions, is_packed, locate_tensors
from moesaic.models.families.family import Family, ModelShape
from moesaic.models.resolved_config import CONFIG, read_config_file, unread_keys
from moesaic.models.safetensors_files import StoredTensor, num_data_bytes, write_shard

Stored = TypeVar("Stored", bound=Tensor | StoredTensor)
"""A tensor, in memory or still in its file."""

RECOVERY = "recovery.json"
"""The file in a checkpoint that lists what was done to it since it was pruned."""
_OF_ONE_STAGE = ("record.json", CURVE)
"""Files beside weights that say how these very weights came about; a rewritten checkpoint has its own."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked, read-only checkpoint. Tensors are memory-mapped and copied only when asked for."""

    directory: Path
    config: Mapping[str, Any]
    """As the model's own class resolves it (:mod:`moesaic.models.resolved_config`)."""
    shape: ModelShape
    architecture: Architecture
    packed: bool
    tensors: Mapping[str, StoredTensor]
    """Where every tensor lies, those that nothing uses included."""

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Decide what a checkpoint is, by its config and its headers; no weight is read.

        Raises:
            ArtifactError: if something is missing, truncated, pickled, or contradicts something else.
        """
        try:
            config = read_config_file(directory)
            tensors = locate_tensors(directory)
        except OSError as unreadable:
            raise ArtifactError(f"{unreadable.filename} cannot be read: {unreadable.strerror}") from unreadable
        try:
            shape, architecture = layout.read_config(config)
            packed = is_packed(config, tensors)
            check_tensors(config, layout.tensor_specs(shape, architecture, packed), tensors)
        except MoesaicError as wrong:
            raise ArtifactError(f"{directory}: {wrong}") from wrong
        return cls(directory, config, shape, architecture, packed, tensors)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self.architecture.num_layers

    @cached_property
    def files(self) -> dict[str, Path]:
        """For every tensor name the shard that holds it."""
        return {name: tensor.file for name, tensor in self.tensors.items()}

    @cached_property
    def unused(self) -> list[str]:
        """Tensors that neither the model nor its KV cache uses; a child does not have them."""
        used = {*layout.tensor_specs(self.shape, self.architecture, self.packed), *self.kv_scales}
        return sorted(set(self.tensors) - used)

    @property
    def left_out(self) -> dict[str, str]:
        """What it has and nothing goes by, for people."""
        notes = {}
        if self.unused:
            notes["not used"] = f"{len(self.unused)} tensors, the first is {self.unused[0]}; a child does not have them"
        if unread := unread_keys(self.config):
            notes["not read"] = f"of {CONFIG}: {', '.join(unread)}; transformers computes without them"
        return notes

    @cached_property
    def kv_scales(self) -> list[str]:
        """The scales of an FP8 KV cache that it brings along."""
        return [name for name in layout.kv_scale_names(self.num_layers) if name in self.tensors]

    @property
    def parts(self) -> list[Path]:
        """The files that it is made of."""
        index = self.directory / INDEX
        return [*sorted(set(self.files.values())), *([index] if index.exists() else []), *companions(self.directory)]

    def check_prunable(self) -> None:
        """Raise an ArtifactError if it brings what no child can have: scales of a KV cache that is not the child's."""
        if self.kv_scales:
            raise ArtifactError(
                f"{self.directory} has {self.kv_scales[0]} of a calibrated KV cache, which do not hold for a child; "
                "give the checkpoint without them, and calibrate the child"
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is on disk; exponents as bytes, whatever their type is called."""
        tensor: Tensor = self._handles[self.files[name]].get_tensor(name)
        return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; nothing of it is read, and nothing stays mapped."""
        stored = self.tensors[name]
        return replace(stored, dtype="U8") if stored.dtype == EXPONENTS else stored

    def shape_of(self, name: str) -> list[int]:
        """The shape of one tensor, from its header."""
        return list(self.tensors[name].shape)

    def layer_names(self, layer: int) -> list[str]:
        """The names of one layer's tensors, in the order of the layout table."""
        return list(layout.layer_specs(self.shape, layer, self.architecture.blocks[layer], self.packed))

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {path: safe_open(path, framework="pt") for path in set(self.files.values())}


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
        stale = source.kv_scales if replaced or added else ()
        places = _flat_names(source)
        weight_map = {name: places[path] for name, path in source.files.items() if name not in stale}
        renamed = {name for name, tensor in source.tensors.items() if tensor.dtype == EXPONENTS}
        changed = {*replaced, *renamed, *stale}
        _copy_companions(source, partial, extra)
        for path, file in sorted(places.items()):
            held = [name for name, holder in source.files.items() if holder == path]
            names = [name for name in held if name in weight_map]
            if changed.isdisjoint(held):
                _link_or_copy(path, partial / file)
            elif names:
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


def modelling_files(family: Family) -> list[Path]:
    """The modules with a child's config and model class, which travel with it."""
    folder = Path(__file__).with_name("families") / family.child_type
    return [folder / f"{kind}_{family.child_type}.py" for kind in ("configuration", "modeling")]


def read_recovery(directory: Path) -> list[dict[str, Any]]:
    """What was done to a checkpoint since it was pruned, first step first."""
    path = directory / RECOVERY
    steps: list[dict[str, Any]] = parse_json(path.read_bytes(), path) if path.is_file() else []
    return steps


def _check_replaced(source: Checkpoint, replaced: Mapping[str, Tensor]) -> None:
    for name, tensor in replaced.items():
        if name not in source.files:
            raise ArtifactError(f"{source.directory} has no tensor {name}; only its own tensors can be replaced")
        if layout.is_expert_weight(name):
            raise ArtifactError(f"{name} belongs to the experts, which recovery keeps as they are")
        shape = tuple(source.shape_of(name))
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}; in {source.directory} it is {shape}")


def _copy_companions(source: Checkpoint, partial: Path, extra: Iterable[Path]) -> None:
    own = {CONFIG, RECOVERY, *_OF_ONE_STAGE}
    for path in (*(path for path in companions(source.directory) if path.name not in own), *extra):
        shutil.copyfile(path, partial / path.name)


def _flat_names(source: Checkpoint) -> dict[Path, str]:
    """What each shard is called in a copy, where none lies in a sub-folder: engines look for them beside the config."""
    places = {path: "-".join(path.relative_to(source.directory).parts) for path in set(source.files.values())}
    if len(set(places.values())) < len(places):
        raise ArtifactError(f"{source.directory}: shards in sub-folders would have one name, once copied; rename one")
    return places


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that is not possible (another file system, a read-only store)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def layer_shards(layer: int, tensors: Mapping[str, Stored]) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Split one layer's tensors into its two shards: the experts, if it has any, and everything else."""
    experts = {name: tensor for name, tensor in tensors.items() if layout.is_expert_weight(name)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in experts}
    if experts:
        yield f"model-layer-{layer:03d}-experts", experts
    yield f"model-layer-{layer:03d}-rest", rest


def _save_shard(path: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
    in_files = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    in_memory = {name: tensor.contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if in_files:
        write_shard(path, in_files)
    else:
        save_file(in_memory, path, metadata={"format": "pt"})
    set_mode(path, 0o644)  # safetensors lets nobody else read what it writes


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

"""Upkeep of a store: verify its objects, find the ones that no manifest references, and delete them."""

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moesaic.core.files import describe_denial
from moesaic.platform.store.content import Store
from moesaic.platform.store.manifest import Manifest
from moesaic.platform.store.root import Item

GRACE_HOURS = 24.0
"""Younger objects are kept: they may belong to a writer at work, who commits its manifest last."""
_OBJECT = re.compile(r"objects/sha256/[0-9a-f]{2}/([0-9a-f]{64})")


@dataclass(frozen=True)
class Garbage:
    """Objects and files that may be deleted."""

    objects: tuple[Item, ...]
    """Objects that no manifest references."""
    leftovers: tuple[Item, ...]
    """Files that interrupted writers left."""
    trees: tuple[Path, ...]
    """Local trees of no manifest; they keep the disk space of their files occupied."""

    @property
    def size_bytes(self) -> int:
        """Bytes under the root that deleting frees."""
        return sum(item.size_bytes for item in self.objects + self.leftovers)


def verify(store: Store, manifests: Iterable[Manifest]) -> list[str]:
    """Read every object of the manifests once and recompute its digest; returns a message for each problem."""
    entries = {entry.sha256: entry for manifest in manifests for entry in manifest.files}
    return store.root.problems(entries.values(), read=True)


def find_garbage(store: Store, grace_hours: float = GRACE_HOURS, now_s: float | None = None) -> Garbage:
    """Find what no manifest references and nobody has written for ``grace_hours``.

    Manifests are read after the objects were listed, so that one committed meanwhile keeps its objects.

    Raises:
        ArtifactError: if a manifest cannot be read; its objects are unknown then, so nothing may be deleted.
    """
    oldest_s = (time.time() if now_s is None else now_s) - grace_hours * 3600
    objects = [item for item in store.root.items("objects/") if item.modified_s < oldest_s]
    leftovers = [item for item in store.root.leftovers() if item.modified_s < oldest_s]
    manifests = list(store.manifests())
    needed = _needed_digests(manifests)
    ids = {manifest.id for manifest in manifests}
    return Garbage(
        objects=tuple(item for item in objects if (match := _OBJECT.fullmatch(item.key)) and match[1] not in needed),
        leftovers=tuple(leftovers),
        trees=tuple(tree for tree in _trees(store) if tree.name not in ids and tree.lstat().st_mtime < oldest_s),
    )


def delete(store: Store, garbage: Garbage) -> list[str]:
    """Delete garbage, except objects that a manifest has come to reference meanwhile.

    Returns:
        A message for each thing that this user may not delete.
    """
    needed = _needed_digests(store.manifests())
    matches = ((item, _OBJECT.fullmatch(item.key)) for item in garbage.objects)
    items = [*(item for item, match in matches if match and match[1] not in needed), *garbage.leftovers]
    removals = [
        *(partial(store.root.delete, item) for item in items),
        *(partial(shutil.rmtree, tree) for tree in garbage.trees),
    ]
    denied = []
    for remove in removals:
        try:
            remove()
        except FileNotFoundError:
            continue  # Someone else deletes it too.
        except PermissionError as denial:
            denied.append(describe_denial(denial, store.directory))
    return denied


def _needed_digests(manifests: Iterable[Manifest]) -> set[str]:
    entries = [entry for manifest in manifests for entry in manifest.files]
    return {entry.sha256 for entry in entries} | {part.sha256 for entry in entries for part in entry.objects}


def _trees(store: Store) -> Iterator[Path]:
    directory = store.directory / "trees"
    return iter(sorted(directory.iterdir()) if directory.is_dir() else ())

"""The store itself: add files, commit a manifest, give a manifest's files back under their names."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moesaic.errors import ArtifactError
from moesaic.store.manifest import FileEntry, Kind, Manifest
from moesaic.store.root import DirectoryRoot, Root, explained_disk_full


class Store:
    """A root with its local trees. Several may write at once: objects and manifests appear whole or not at all."""

    def __init__(self, root: Root, directory: Path) -> None:
        """Use ``directory`` for trees; it should lie on the disk of a directory root, so that trees are links."""
        self.root = root
        self.directory = directory

    @classmethod
    def at(cls, directory: Path) -> "Store":
        """The store whose root is a directory."""
        return cls(DirectoryRoot(directory), directory)

    def add_directory(
        self,
        directory: Path,
        kind: Kind,
        *,
        format: str,
        producer: str,
        parents: tuple[str, ...] = (),
        config_digest: str | None = None,
        move: bool = False,
    ) -> Manifest:
        """Add a directory's files (hidden ones excepted) and commit their manifest.

        ``move`` consumes files instead of copying them: for a stage's own working directory.

        Raises:
            ArtifactError: if the directory is missing or holds no files.
            StageError: if the disk is full; no manifest is committed then.
        """
        if not directory.is_dir():
            raise ArtifactError(f"{directory} is not a directory; give the directory of a {kind}")
        files = {path.relative_to(directory).as_posix(): path for path in _visible_files(directory)}
        if not files:
            raise ArtifactError(f"{directory} holds no files to add as a {kind}")
        entries = tuple(self._add_file(name, files[name], move) for name in sorted(files))
        manifest = Manifest(
            kind=kind, format=format, producer=producer, parents=parents, config_digest=config_digest, files=entries
        )
        return self.commit(manifest)

    def add_file(self, path: Path, kind: Kind, *, format: str, producer: str) -> Manifest:
        """Add one file under its own name and commit its manifest."""
        if not path.is_file():
            raise ArtifactError(f"{path} is not a file; give the file of a {kind}")
        entry = self._add_file(path.name, path, move=False)
        return self.commit(Manifest(kind=kind, format=format, producer=producer, files=(entry,)))

    def commit(self, manifest: Manifest) -> Manifest:
        """Make a manifest visible, once all of its objects are here."""
        for entry in manifest.files:
            self._check_object(entry)
        key = _manifest_key(manifest.id)
        if self.root.size(key) is None:
            self.root.write(key, manifest.to_json().encode())
        return manifest

    def manifest(self, manifest_id: str) -> Manifest:
        """The committed manifest with this id."""
        try:
            content = self.root.read(_manifest_key(manifest_id))
        except FileNotFoundError as missing:
            raise ArtifactError(
                f"the store at {self.directory} holds no manifest {manifest_id}; add it first"
            ) from missing
        if hashlib.sha256(content).hexdigest() != manifest_id:
            raise ArtifactError(f"manifest {manifest_id} in {self.directory} was changed; remove it and add it again")
        return Manifest.parse(content, f"manifest {manifest_id}")

    def materialize(self, manifest: Manifest, *, verify: bool = False) -> Path:
        """The directory in which the manifest's files lie under their names: links, to be read only.

        Sizes are always checked; ``verify`` also recomputes every digest.

        Raises:
            ArtifactError: if an object is missing or damaged.
        """
        for entry in manifest.files:
            self._check_object(entry, verify)
        tree = self.directory / "trees" / manifest.id
        if not _is_complete(tree, manifest):
            self._build_tree(tree, manifest)
        return tree

    def _add_file(self, name: str, path: Path, move: bool) -> FileEntry:
        entry = FileEntry(path=name, size_bytes=path.stat().st_size, sha256=_digest(path))
        key = _object_key(entry.sha256)
        if self.root.size(key) == entry.size_bytes:
            return entry
        if move:
            self.root.put_file(key, path)
            return entry
        with self._private_copy(path) as copy:
            if _digest(copy) != entry.sha256:
                raise ArtifactError(f"{path} changed while it was added to the store; add it again once it is finished")
            self.root.put_file(key, copy)
        return entry

    @contextmanager
    def _private_copy(self, path: Path) -> Iterator[Path]:
        copy = self.directory / "arriving" / uuid.uuid4().hex
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with explained_disk_full(self.directory):
                shutil.copyfile(path, copy)
                yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _check_object(self, entry: FileEntry, verify: bool = False) -> None:
        key = _object_key(entry.sha256)
        size = self.root.size(key)
        problem = None
        if size is None:
            problem = "is missing"
        elif size != entry.size_bytes:
            problem = f"has {size} bytes instead of {entry.size_bytes}"
        elif verify and _digest(self.root.local_file(key)) != entry.sha256:
            problem = "has another content than its digest says"
        if problem:
            raise ArtifactError(
                f"object {entry.sha256} ({entry.path}) in {self.directory} {problem}; "
                "remove it and add its model or data set again"
            )

    def _build_tree(self, tree: Path, manifest: Manifest) -> None:
        partial = tree.with_name(f".{tree.name}.{uuid.uuid4().hex}")
        try:
            with explained_disk_full(self.directory):
                for entry in manifest.files:
                    place = partial / entry.path
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _link(self.root.local_file(_object_key(entry.sha256)), place)
                _put_in_place(partial, tree, manifest)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _object_key(digest: str) -> str:
    return f"objects/sha256/{digest[:2]}/{digest}"


def _manifest_key(manifest_id: str) -> str:
    return f"manifests/{manifest_id}.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _visible_files(directory: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return found


def _is_complete(tree: Path, manifest: Manifest) -> bool:
    sizes: Mapping[Path, int] = {tree / entry.path: entry.size_bytes for entry in manifest.files}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:
        place.symlink_to(source.resolve())


def _put_in_place(partial: Path, tree: Path, manifest: Manifest) -> None:
    """Rename ``partial`` to ``tree``; another writer's equal tree is kept, a damaged one replaced."""
    try:
        partial.rename(tree)
    except OSError:
        if _is_complete(tree, manifest):
            return
        tree.rename(tree.with_name(f".{tree.name}.damaged-{uuid.uuid4().hex}"))
        partial.rename(tree)

"""The store: add files, commit a manifest, and lay out a manifest's files under their names."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moesaic.core.cache import cache_directory
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.files import explained_file_errors, make_folder
from moesaic.platform.store.manifest import FileEntry, Kind, Manifest
from moesaic.platform.store.root import DirectoryRoot, Root, describe_problem
from moesaic.platform.store.s3_options import SCHEME, S3Options

Address = Path | str
"""The address of a store: a directory, or ``s3://bucket/prefix``."""


def parse_address(text: str) -> Address:
    """Parse an address; that of a directory becomes a path. :meth:`Store.at` refuses those of other kinds."""
    return text if "://" in text or not text else Path(text)


class Store:
    """A root with its local trees. Several may write at once: objects and manifests appear whole or not at all."""

    def __init__(self, root: Root, directory: Path) -> None:
        """Use ``directory`` for trees; it should lie on the disk of a directory root, so that trees are links."""
        self.root = root
        self.directory = directory

    @classmethod
    def at(cls, address: Address, options: S3Options | None = None) -> "Store":
        """The store in a directory or at ``s3://bucket/prefix``.

        ``options`` concern S3 alone; by default they are read from environment variables (docs/store.md).

        Raises:
            ConfigError: if the address, the bucket or the credentials cannot be used.
        """
        if isinstance(address, str) and address.startswith(SCHEME):
            return cls._at_bucket(address.rstrip("/"), options or S3Options.from_environment())
        if isinstance(address, str) and ("://" in address or not address):
            raise ConfigError(f"{address!r} is no address of a store; give a directory, or s3://bucket/prefix")
        return cls(DirectoryRoot(Path(address)), Path(address))

    @classmethod
    def _at_bucket(cls, address: str, options: S3Options) -> "Store":
        try:
            from moesaic.platform.store.s3 import S3Root
        except ModuleNotFoundError as missing:
            raise ConfigError(f"{address} needs boto3; pip install 'moesaic[s3]'") from missing
        whole = f"{options.endpoint_url or ''} {address}"
        directory = cache_directory() / f"s3-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"
        return cls(S3Root(address, directory, options), directory)

    def add_directory(
        self,
        directory: Path,
        kind: Kind,
        *,
        format: str,
        producer: str,
        parents: tuple[str, ...] = (),
        config_digest: str | None = None,
        source: str | None = None,
        move: bool = False,
        only: Iterable[Path] | None = None,
    ) -> Manifest:
        """Add a directory's files (hidden ones excepted), or ``only`` these of them, and commit their manifest.

        ``move`` consumes files instead of copying them: for a stage's own working directory.

        Raises:
            ArtifactError: if the directory is missing or holds no files.
            StageError: if the disk is full; no manifest is committed then.
        """
        if not directory.is_dir():
            raise ArtifactError(f"{directory} is not a directory; give the directory of a {kind}")
        files = {path.relative_to(directory).as_posix(): path for path in only or _visible_files(directory)}
        if not files:
            raise ArtifactError(f"{directory} holds no files to add as a {kind}")
        entries = self.root.put_files(dict(sorted(files.items())), move=move)
        manifest = Manifest(
            kind=kind,
            format=format,
            producer=producer,
            parents=parents,
            config_digest=config_digest,
            source=source,
            files=entries,
        )
        return self.commit(manifest)

    def add_file(self, path: Path, kind: Kind, *, format: str, producer: str) -> Manifest:
        """Add one file under its own name and commit its manifest."""
        if not path.is_file():
            raise ArtifactError(f"{path} is not a file; give the file of a {kind}")
        entries = self.root.put_files({path.name: path}, move=False)
        return self.commit(Manifest(kind=kind, format=format, producer=producer, files=entries))

    def commit(self, manifest: Manifest) -> Manifest:
        """Make a manifest visible, once all of its objects are stored; returns the visible one.

        If two writers cut the same files into different parts, the first one's manifest stays.

        Raises:
            ArtifactError: if an object is missing.
        """
        for problem in self.root.problems(manifest.files):
            raise ArtifactError(problem)
        key = _manifest_key(manifest.id)
        if self.root.size(key) is None:
            self.root.write(key, manifest.to_json().encode())
        return self.manifest(manifest.id)

    def manifest(self, manifest_id: str) -> Manifest:
        """The committed manifest with this id."""
        try:
            content = self.root.read(_manifest_key(manifest_id))
        except FileNotFoundError as missing:
            raise ArtifactError(
                f"the store at {self.root.address} holds no manifest {manifest_id}; add it first"
            ) from missing
        manifest = Manifest.parse(content, f"manifest {manifest_id}")
        if manifest.id != manifest_id:
            raise ArtifactError(
                f"manifest {manifest_id} in {self.root.address} was changed; remove it and add it again"
            )
        return manifest

    def manifests(self) -> Iterator[Manifest]:
        """All committed manifests, in the order of their ids."""
        for item in self.root.items("manifests/"):
            yield self.manifest(item.key.removeprefix("manifests/").removesuffix(".json"))

    def materialize(self, manifest: Manifest, *, verify: bool = False) -> Path:
        """The directory in which the manifest's files lie under their names: links, to be read only.

        Sizes are always checked; ``verify`` also recomputes every digest. What is fetched from afar is always verified.

        Raises:
            ArtifactError: if an object is missing or damaged.
        """
        try:
            files = self.root.local_files(manifest.files, verify=verify)
        except ArtifactError:
            # Without conditional puts another writer's manifest may have replaced this one: equal files, other parts.
            if not self.root.problems(manifest.files) or (committed := self.manifest(manifest.id)) == manifest:
                raise
            files = self.root.local_files(committed.files, verify=verify)
        tree = self.directory / "trees" / manifest.id
        if not _is_complete(tree, manifest, files):
            self._build_tree(tree, manifest, files)
        return tree

    def read_range(self, entry: FileEntry, start: int, length: int) -> bytes:
        """``length`` bytes of a file from the byte ``start`` on, without fetching the rest; they cannot be verified.

        Raises:
            ArtifactError: if its object is missing or shorter.
        """
        content = self.root.read_range(entry, start, length)
        if len(content) != length:
            problem = f"ends before byte {start + length} of the file"
            raise ArtifactError(describe_problem(entry, entry.sha256, self.root.address, problem))
        return content

    def _build_tree(self, tree: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
        partial = tree.with_name(f".{tree.name}.{uuid.uuid4().hex}")
        try:
            with explained_file_errors(self.directory):
                for entry in manifest.files:
                    link = partial / entry.path
                    make_folder(link.parent, self.directory)
                    _link(files[entry.sha256], link)
                _put_in_place(partial, tree, manifest, files)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _manifest_key(manifest_id: str) -> str:
    return f"manifests/{manifest_id}.json"


def _visible_files(directory: Path) -> list[Path]:
    files: list[Path] = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    return files


def _is_complete(tree: Path, manifest: Manifest, files: Mapping[str, Path]) -> bool:
    """Whether the tree links to exactly these files; a file that was fetched again has another inode."""
    pairs = [(tree / entry.path, files[entry.sha256]) for entry in manifest.files]
    return all(path.is_file() and path.samefile(file) for path, file in pairs)


def _link(source: Path, link: Path) -> None:
    """Make a hard link, or a relative one where the file is another user's: the store may be mounted elsewhere too."""
    try:
        os.link(source, link)
    except OSError:
        link.symlink_to(os.path.relpath(source.resolve(), link.parent.resolve()))


def _put_in_place(partial: Path, tree: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Rename ``partial`` to ``tree``; another writer's equal tree is kept, a damaged one replaced."""
    try:
        partial.rename(tree)
    except OSError:
        if _is_complete(tree, manifest, files):
            return
        tree.rename(tree.with_name(f".{tree.name}.damaged-{uuid.uuid4().hex}"))
        partial.rename(tree)

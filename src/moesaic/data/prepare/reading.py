"""Where a source's rows come from: files here, or of a repository on the Hugging Face hub; read one row at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.files import file_digest
from moesaic.data.datasets import Row, iterate_rows
from moesaic.data.prepare.config import Source
from moesaic.data.prepare.known_sets import KNOWN_SETS

_READ = (".jsonl", ".parquet")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Found:
    """A source whose files are here."""

    source: Source
    files: tuple[Path, ...]
    origin: Mapping[str, Any]
    """What the summary says of it: a set's name, commit and licence, or the digests of a user's files."""


def find_source(source: Source, given: Mapping[str, Path]) -> Found:
    """Find a source's files; those of the hub are fetched if they are not cached.

    Args:
        source: what is wanted.
        given: local files or folders by name.

    Raises:
        ConfigError: if a local name was not given.
        ArtifactError: if there are no such files.
        StageError: if they cannot be fetched.
    """
    if source.local is not None:
        if source.local not in given:
            raise ConfigError(f"the config names the files {source.local!r}; give them: --files {source.local}=PATH")
        files = _local(given[source.local])
        return Found(source, files, {"files": {path.name: file_digest(path) for path in files}})
    from moesaic.core.hub import fetch

    known = KNOWN_SETS[source.known] if source.known else None
    repository = known.hub if known else str(source.hub)
    parts = source.parts or (next(iter(known.parts)),) if known else ()
    patterns = source.files or tuple(known.parts[part] for part in parts if known)
    snapshot = fetch(repository, source.revision or (known.revision if known else None), "dataset", patterns)
    paths = {path.relative_to(snapshot.folder).as_posix(): path for path in snapshot.folder.rglob("*")}
    chosen = tuple(paths[name] for name in sorted(paths) if any(fnmatch(name, pattern) for pattern in patterns))
    licence = known.licence if known else "see its card"
    names = [path.relative_to(snapshot.folder).as_posix() for path in chosen]
    return Found(source, _readable(chosen), {"from": snapshot.source, "licence": licence, "files": names})


def _local(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        shown = (one for one in path.iterdir() if not one.name.startswith("."))
        return _readable(tuple(sorted(one for one in shown if one.suffix in _READ)), path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; give a file of JSON lines or parquet, or a folder of such files")
    return _readable((path,))


def _readable(files: tuple[Path, ...], folder: Path | None = None) -> tuple[Path, ...]:
    if not files:
        raise ArtifactError(f"{folder} holds no file that ends in {' or '.join(_READ)}")
    for path in files:
        if path.suffix not in _READ:
            raise ArtifactError(f"{path} ends in {path.suffix!r}; rows are read from files that end in {_READ}")
    return files


def iterate_files(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of some files, one after the other; memory holds some of them, not a file.

    Raises:
        ArtifactError: if a file is damaged or no such file; the message names it.
        ConfigError: if parquet cannot be read here.
    """
    for path in files:
        yield from _iterate_parquet(path) if path.suffix == ".parquet" else iterate_rows(path)


def _iterate_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as missing:
        raise ConfigError(f"{path} is parquet, which needs pyarrow: pip install 'moesaic[data]'") from missing
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as broken:
        said = " ".join(str(broken).split())
        raise ArtifactError(f"{path} cannot be read as parquet: {said}; copy or download it again") from broken

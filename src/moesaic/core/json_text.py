"""Text and JSON that come from outside: read strictly, and what is wrong with them said in one line."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError

_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"GGUF": "a GGUF file",
    b"SQLite format 3": "a database of SQLite",
    b"version https://git-lfs": "a Git LFS pointer, whose content was not fetched (`git lfs pull` does it)",
}
"""By how a file begins, what it is instead of what was asked for."""


def foreign_kind(content: bytes) -> str | None:
    """What a file is, by its first bytes, if it is of a well-known other kind."""
    return next((kind for start, kind in _FOREIGN.items() if content.startswith(start)), None)


def parse_json(content: bytes, place: object) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Args:
        content: the text.
        place: where it stands, for messages.

    Raises:
        ArtifactError: if it is not UTF-8 or not JSON, names a key twice, or has text or numbers that nothing can hold.
    """
    text = _decode(content, place)
    try:
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as broken:
        raise ArtifactError(f"{place} holds half of a surrogate pair, which is no character; remove it") from broken
    except (ValueError, RecursionError) as broken:
        raise ArtifactError(f"{place} is not valid JSON: {broken}{_clue(text)}") from broken
    return value


def read_json_object(path: Path, missing: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        missing: what to say if there is none.

    Raises:
        ArtifactError: if it cannot be read, or holds anything else.
    """
    value = parse_json(read_text(path, missing).encode(), path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def read_text(path: Path, missing: str = "") -> str:
    """The text of a file in UTF-8.

    Args:
        path: the file.
        missing: what to say if there is none.

    Raises:
        ArtifactError: if it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as unreadable:
        if path.is_symlink() and isinstance(unreadable, FileNotFoundError):
            raise ArtifactError(f"{path} is a link to {path.readlink()}, which does not exist") from unreadable
        hint = missing if isinstance(unreadable, FileNotFoundError) and missing else f"{path}: {unreadable.strerror}"
        raise ArtifactError(hint) from unreadable
    if kind := foreign_kind(content):
        raise ArtifactError(f"{path} is {kind}; it must be text in UTF-8")
    return _decode(content, path)


def _decode(content: bytes, place: object) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        raise ArtifactError(f"{place} is not UTF-8 text ({broken.reason}); save it as UTF-8") from broken


def _clue(text: str) -> str:
    """What a text is that is no JSON."""
    if text.lstrip().startswith("<"):
        return "; it is a web page, maybe to log in"
    return "; it holds bytes of zero, as text in UTF-16 does, or a file after a crash" if "\0" in text else ""


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)

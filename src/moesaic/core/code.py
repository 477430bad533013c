"""The version of the code: the release, and a digest that differs in a changed checkout."""

import hashlib
from functools import cache
from pathlib import Path

from moesaic.core.version import __version__


@cache
def code_digest() -> str:
    """Digest of Moesaic's own source; it differs between a release and a changed checkout."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(
            f"{file.relative_to(package).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def code_version() -> str:
    """The package version with the start of the code digest; part of every task's cache key."""
    return f"{__version__}+{code_digest()[:12]}"

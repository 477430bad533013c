"""The order of the stages and their resources, and complete, named values for them (``recipes``)."""

import re
from pathlib import Path

MANIFESTS = Path(__file__).parents[1] / "manifests" / "pipelines"
"""Where the compiled pipelines are, ``<name>-<version>.yaml``."""

_MANIFEST = re.compile(r"(?P<name>.+)-(?P<version>\d+\.\d+\.\d+)")


def compiled(directory: Path = MANIFESTS) -> dict[str, Path]:
    """The newest version of every compiled pipeline, by name."""
    found: dict[str, tuple[tuple[int, ...], Path]] = {}
    for path in directory.glob("*.yaml"):
        if match := _MANIFEST.fullmatch(path.stem):
            version = tuple(int(part) for part in match["version"].split("."))
            found[match["name"]] = max(found.get(match["name"], (version, path)), (version, path))
    return {name: path for name, (_, path) in sorted(found.items())}

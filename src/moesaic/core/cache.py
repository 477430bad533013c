"""The user's cache directory, for files that can be made or fetched again."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_directory(variables: Mapping[str, str] = os.environ) -> Path:
    """The cache directory: ``MOESAIC_CACHE``, else ``moesaic`` in the user's cache directory."""
    if given := variables.get("MOESAIC_CACHE"):
        return Path(given).absolute()
    return Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"

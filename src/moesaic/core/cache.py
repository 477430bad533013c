"""Where this user's files lie that can be made or fetched again."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where remote stores keep what they fetched: ``MOESAIC_CACHE``, else ``moesaic`` in the user's cache directory."""
    if given := environment.get("MOESAIC_CACHE"):
        return Path(given).absolute()
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"

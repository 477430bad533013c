"""The config that a command is given: JSON itself, or the path of a file that holds it."""

from pathlib import Path

from moesaic.core.errors import ConfigError


def read_config(given: str) -> str:
    """The JSON text of a config option."""
    if given.lstrip().startswith("{"):
        return given
    if not Path(given).is_file():
        raise ConfigError(f"config {given!r} is neither JSON nor a file that holds it; '{{}}' stands for the defaults")
    return Path(given).read_text()

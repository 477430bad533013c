"""The config that a command is given: JSON itself, or the path of a file that holds it."""

from pathlib import Path

from moesaic.core.json_text import read_text


def read_config(given: str) -> str:
    """The JSON text of a config option."""
    if given.lstrip().startswith("{"):
        return given
    missing = f"config {given!r} is neither JSON nor a file that holds it; '{{}}' stands for the defaults"
    return read_text(Path(given), missing)

"""The config that a command is given: JSON itself, or the path of a file that holds it."""

from pathlib import Path

from moesaic.core.json_text import parse_json, read_text


def read_config(given: str) -> str:
    """The JSON text of a config option.

    Raises:
        ArtifactError: if it is neither JSON, with every key once, nor a file that holds such.
    """
    if given.lstrip().startswith("{"):
        parse_json(given.encode("utf-8", "surrogateescape"), "the config")
        return given
    missing = f"config {given!r} is neither JSON nor a file that holds it; '{{}}' stands for the defaults"
    text = read_text(Path(given), missing)
    parse_json(text.encode(), given)
    return text

"""What an installed package runs: the compiled pipelines as data, and recipes with complete values for them.

Pipelines are described in ``pipelines/`` at the top of the repository, and compiled from there by ``make compile``.
"""

import re
from pathlib import Path

from moesaic.core.errors import ConfigError

COMPILED = Path(__file__).parent / "compiled"
"""Where the compiled pipelines are, ``<name>-<version>.yaml``."""

_FILE = re.compile(r"(?P<name>.+)-(?P<version>\d+\.\d+\.\d+)")


def compiled(directory: Path = COMPILED) -> dict[str, Path]:
    """The newest version of every compiled pipeline, by name."""
    newest: dict[str, tuple[tuple[int, ...], Path]] = {}
    for path in directory.glob("*.yaml"):
        if match := _FILE.fullmatch(path.stem):
            version = tuple(int(part) for part in match["version"].split("."))
            newest[match["name"]] = max(newest.get(match["name"], (version, path)), (version, path))
    return {name: path for name, (_, path) in sorted(newest.items())}


def pipeline_name(rounds: int, control: bool) -> str:
    """What ``compress`` is called with so many rounds of pruning, with or without a control that is recovered too.

    ``compress``, ``compress-2-rounds``, ``compress-without-control``, ``compress-2-rounds-without-control``.
    """
    return "compress" + (f"-{rounds}-rounds" if rounds > 1 else "") + ("" if control else "-without-control")


def find_pipeline(name: str, rounds: int, control: bool) -> Path:
    """The compiled pipeline of this name for a recipe of so many rounds, with or without a control.

    Raises:
        ConfigError: if there is none, naming those there are.
    """
    available = compiled()
    wanted = pipeline_name(rounds, control) if name == "compress" else name
    if wanted not in available:
        raise ConfigError(f"there is no compiled pipeline {wanted!r}; choose one of {', '.join(available)}")
    return available[wanted]


def example() -> Path:
    """The tiny reasoner, a trained model to try everything on: folders ``parent`` and ``data``."""
    return Path(__file__).parent / "tiny_reasoner"

"""The table of stages, read off the rooms: every package of a ring that holds a ``stage.py`` is a stage."""

from importlib import import_module
from importlib.resources import files
from pkgutil import iter_modules

from moesaic.core.errors import ConfigError
from moesaic.core.stage import Stage

_RINGS = ("platform", "search", "recover", "measure", "deploy")


def _declared() -> list[Stage]:
    """The declarations of all rooms; none of their functions is imported."""
    rooms = [
        f"moesaic.{ring}.{room.name}"
        for ring in _RINGS
        for room in iter_modules([str(files(f"moesaic.{ring}"))])
        if room.ispkg and files(f"moesaic.{ring}").joinpath(room.name, "stage.py").is_file()
    ]
    return [import_module(f"{room}.stage").STAGE for room in rooms]


STAGES = {stage.name: stage for stage in _declared()}
"""Every stage by its name."""


def find_stage(name: str) -> Stage:
    """The stage of this name; ConfigError names those there are."""
    if name not in STAGES:
        raise ConfigError(f"there is no stage {name!r}; choose one of {', '.join(STAGES)}")
    return STAGES[name]

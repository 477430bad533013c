"""The tables of hardware that come with the package, one JSON file each."""

from importlib.resources import files

from moesaic.core.errors import ConfigError
from moesaic.costs.hardware import HardwareTable


def read_table(name: str) -> HardwareTable:
    """The table of this name; ConfigError names those there are."""
    tables = {entry.name.removesuffix(".json"): entry for entry in files(__package__).iterdir()}
    tables = {stem: entry for stem, entry in tables.items() if entry.name.endswith(".json")}
    if name not in tables:
        raise ConfigError(f"there is no hardware table {name!r}; choose one of {', '.join(sorted(tables))}")
    return HardwareTable.from_json(tables[name].read_text())

"""A model by what a user calls it: a folder here, or ``OWNER/NAME`` on a Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import ConfigError

_WANTED = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "USAGE_POLICY*"),
)
"""Weights in safetensors and what describes them: no pickles, and no code."""
_UNWANTED = ("original/*", "metal/*", ".*")
"""The same weights in the formats of other programs, beside those of gpt-oss."""


@dataclass(frozen=True)
class NamedModel:
    """Where a model lies, and where it came from."""

    folder: Path
    source: str | None = None
    """Its address on the hub with the commit; None for a folder that was given."""


def find_model(given: str, revision: str | None = None) -> NamedModel:
    """A model's folder; what is named on a hub and not cached yet is fetched.

    Args:
        given: a path, or OWNER/NAME; a folder of that name comes first.
        revision: of the repository: branch, tag or commit.

    Raises:
        ConfigError: for the revision of a folder, an address, or a name with more behind it.
        ArtifactError: if the hub has no such model, or one may not have it.
        StageError: if it cannot be fetched.
    """
    from moesaic.core.hub import fetch, is_hub_name

    if "://" in given:
        raise ConfigError(
            f"{given} is an address; give a model by its folder, or as OWNER/NAME of a hub, such as openai/gpt-oss-20b"
        )
    name, _, at = given.rstrip("/").partition("@")
    if name != given and is_hub_name(name) and not Path(given).exists():
        raise ConfigError(
            f"there is no folder {given}; for {name} of a hub write {name}{f' --revision {at}' if at else ''}"
        )
    if not is_hub_name(given):
        if revision is not None:
            raise ConfigError(f"--revision {revision} is of a name on a hub, OWNER/NAME; {given} is a path here")
        return NamedModel(Path(given))
    snapshot = fetch(given, revision, "model", _WANTED, _UNWANTED)
    return NamedModel(snapshot.folder, snapshot.source)

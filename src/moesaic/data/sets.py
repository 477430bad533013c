"""The data sets that a run starts from, under their usual names in one directory."""

from dataclasses import dataclass, fields
from pathlib import Path

from moesaic.core.errors import ArtifactError
from moesaic.data.datasets import read_rows


@dataclass(frozen=True)
class DataSets:
    """The data sets of a run, each a file of JSON lines."""

    calibration_short: Path
    """Conversations that rank experts and score blocks."""
    calibration_long: Path
    """Conversations whose answers depend on far context."""
    prompts: Path
    """Problems that the parent answers for distillation, and that policies are trained on."""
    tests: Path
    """Problems to evaluate on."""

    @classmethod
    def at(cls, directory: Path) -> "DataSets":
        """The data sets of a directory, by their usual file names; nothing is read."""
        return cls(**{name: directory / file for name, file in FILES.items()})

    def by_name(self) -> dict[str, Path]:
        """The files by the name of the set."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self) -> None:
        """Read every row.

        Raises:
            ArtifactError: if a file is missing, or is not JSON lines.
        """
        for path in self.by_name().values():
            if not path.is_file():
                names = ", ".join(FILES.values())
                raise ArtifactError(f"{path.parent} holds no {path.name}; a data directory holds {names}")
            read_rows(path)


FILES = {
    "calibration_short": "calibration_short.jsonl",
    "calibration_long": "calibration_long.jsonl",
    "prompts": "prompts.jsonl",
    "tests": "test.jsonl",
}
"""The file of each set."""

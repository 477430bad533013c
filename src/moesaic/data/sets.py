"""The data sets that a run starts from, under their usual names in one directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError


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
        """Read every row as what it is for.

        Raises:
            ArtifactError: if a file is missing, not JSON lines, or a row is not of its set.
        """
        for name, path in self.by_name().items():
            if not path.is_file():
                names = ", ".join(FILES.values())
                raise ArtifactError(f"{path.parent} holds no {path.name}; a data directory holds {names}")
            count_rows(name, path)

    def check_template(self, model: Path) -> None:
        """Render a row of every shape, which is the roles and keys of its messages, as the model will see it.

        Raises:
            ArtifactError: if the model has no tokenizer with a chat template, or that refuses a row.
        """
        from moesaic.data.calibration import read_conversations, tokenize
        from moesaic.data.chat import load_tokenizer
        from moesaic.data.problems import read_problems, render_prompt

        tokenizer = load_tokenizer(model)
        for path in (self.calibration_short, self.calibration_long):
            for row in {_shape(row.messages): row for row in read_conversations(path)}.values():
                tokenize(tokenizer, row, max_tokens=1)
        for path in (self.prompts, self.tests):
            rows = {_shape([vars(message) for message in row.prompt]): row for row in read_problems(path)}
            for problem in rows.values():
                render_prompt(problem, tokenizer, "low")


def _shape(messages: Sequence[Mapping[str, Any]]) -> frozenset[tuple[str, frozenset[str]]]:
    return frozenset((message["role"], frozenset(message)) for message in messages)


def count_rows(name: str, path: Path) -> int:
    """Read every row of the set of this name, and count them.

    Raises:
        ArtifactError: for a row that is not of that set.
    """
    from moesaic.data.calibration import read_conversations  # these load transformers, which the names above do not
    from moesaic.data.problems import read_problems

    return len(read_conversations(path) if name.startswith("calibration") else read_problems(path))


FILES = {
    "calibration_short": "calibration_short.jsonl",
    "calibration_long": "calibration_long.jsonl",
    "prompts": "prompts.jsonl",
    "tests": "test.jsonl",
}
"""The file of each set."""

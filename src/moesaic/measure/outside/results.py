"""What any harness measured of one model, in one form; and how its files are read."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import foreign_kind
from moesaic.measure.paired import Mean, Verdicts

_PLACES = {
    *("api_key", "api_key_name", "base_url", "batch_size", "cache_dir", "caching_dir", "hf_token", "max_retries"),
    *("num_concurrent", "output_dir", "parallelism", "request_timeout", "timeout", "tokenizer", "url"),
}
"""Settings that say where something runs and how often it is tried, not what is asked."""
_SHOWN = 5
"""The number of differing settings that an error lists."""


class FromHarness(BaseModel):
    """The part that is read of an object in a harness's file; what else it holds is left alone."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, protected_namespaces=())


_Content = TypeVar("_Content", bound=FromHarness)


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    value: float
    """A share, 0 to 1; more is better."""
    standard_error: float | None = None
    """As the harness gives it; None if it gives none."""
    verdicts: Verdicts | None = None
    """Problem by problem; None if only the mean is known."""

    @property
    def mean(self) -> Mean | None:
        """The mean with its standard error; None without one, or with one of 0, which would claim certainty."""
        return Mean(self.value, self.standard_error) if self.standard_error and self.standard_error > 0 else None


@dataclass(frozen=True)
class Task:
    """What a harness measured of one model on one task."""

    name: str
    harness: str
    """Its name and version."""
    model: str
    """The model's name, as the harness knew it."""
    settings: Mapping[str, Any]
    """All that must be equal for two results to compare: the task's version, few-shots, prompts, generation."""
    scores: Mapping[str, Score]
    """By metric."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """By metric, why it is no accuracy."""
    files: Sequence[Path] = ()
    """That this was read from."""

    @property
    def efforts(self) -> set[str]:
        """The reasoning efforts that its requests asked for, where the harness recorded that."""
        return {str(value) for name, value in self.settings.items() if name.rpartition(".")[2] == "reasoning_effort"}


def sort_scores(unfit: Mapping[str, str], scores: Mapping[str, Score]) -> tuple[dict[str, Score], dict[str, str]]:
    """The scores that can be compared, and by metric why others cannot; ``unfit`` are known to be others."""
    left_out = dict(unfit)
    for name, score in scores.items():
        if not 0 <= score.value <= 1:
            left_out[name] = f"{score.value:g} is not a share between 0 and 1"
        elif score.verdicts is None and score.mean is None:
            left_out[name] = "known only as a mean without a standard error"
    return {name: score for name, score in scores.items() if name not in left_out}, left_out


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted names, without those that name places and models."""
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items() if key not in _PLACES}
    elif isinstance(value, list):
        parts = {str(place): part for place, part in enumerate(value)}
    else:
        return {} if value is None else {name: value}
    return {key: one for part, of in parts.items() for key, one in flat(of, f"{name}.{part}" if name else part).items()}


def check_settings(parent: Task, child: Task) -> None:
    """Raise ArtifactError unless both were asked in the same way."""
    names = sorted(parent.settings.keys() | child.settings.keys())
    every = [(name, parent.settings.get(name), child.settings.get(name)) for name in names]
    differing = [
        f"{name} ({_short(old)} of the parent, {_short(new)} of the child)" for name, old, new in every if old != new
    ]
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ArtifactError(
            f"task {parent.name}: parent and child differ in {', '.join(differing[:_SHOWN])}{more}; "
            "run the harness on both with the same version and settings"
        )


def _short(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def digest(*parts: object) -> str:
    """A short digest that stands for texts."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def number_of(value: Any) -> float | None:
    """A finite number; None for anything else, such as ``"N/A"``."""
    try:
        found = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def share_of(value: Any) -> float | None:
    """A number between 0 and 1; None for anything else."""
    return float(value) if isinstance(value, (bool, int, float)) and 0 <= value <= 1 else None


def parse(kind: type[_Content], content: str | bytes | Any, place: object) -> _Content:
    """The part of a harness's JSON, or of an object that was read from its YAML, that is understood.

    Raises:
        ArtifactError: that names the place, and the first thing that is wrong there.
    """
    try:
        return kind.model_validate_json(content) if isinstance(content, str | bytes) else kind.model_validate(content)
    except (ValidationError, RecursionError) as invalid:
        raise ArtifactError(
            f"{place} is not what the harness writes: {_explain(invalid)}; give its output as it was"
        ) from (invalid)


def _explain(invalid: ValidationError | RecursionError) -> str:
    if isinstance(invalid, RecursionError):
        return "nested too deep"
    first = invalid.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file that are not blank.

    Raises:
        ArtifactError: if it cannot be read, or is of another kind.
    """
    try:
        with path.open("rb") as lines:
            if kind := foreign_kind(lines.peek()):
                raise ArtifactError(f"{path} is {kind}; it must be text in UTF-8")
            yield from (line for line in lines if line.strip())
    except OSError as unreadable:
        raise ArtifactError(f"{path} cannot be read: {unreadable.strerror}") from unreadable

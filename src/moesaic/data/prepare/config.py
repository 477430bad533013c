"""What is prepared: for each data set of a run, from which sources, how many rows of which length."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from moesaic.core.config import Config, Efforts, Positive
from moesaic.data.prepare.known_sets import KNOWN_SETS
from moesaic.data.prepare.layouts import LAYOUTS


class Source(Config):
    """Rows of a public set, or of a user's own files."""

    known: str | None = None
    """A known public set, such as ``nemotron_v1``."""
    hub: str | None = None
    """Or any set on the Hugging Face hub: OWNER/NAME."""
    local: str | None = None
    """Or the name of files that the command line gives: ``--files NAME=PATH``."""
    revision: str | None = None
    """Branch, tag or commit of a set on the hub. None: its main branch, or the one that a known set needs."""
    parts: tuple[str, ...] = ()
    """Of a known set; none: its first."""
    files: tuple[str, ...] = ()
    """Patterns of the repository's files, instead of those of the parts."""
    layout: str | None = None
    """How rows are read, see docs/data.md. None: as the known set is, or as ours are."""
    max_rows: Positive | None = None
    """No more rows than these are read, the first ones. None: all."""

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        named = [name for name in ("known", "hub", "local") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"a source is one of known, hub and local; this names {', '.join(named) or 'none'}")
        if self.known is not None and self.known not in KNOWN_SETS:
            raise ValueError(f"there is no known set {self.known!r}; known are {', '.join(KNOWN_SETS)}")
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"there is no layout {self.layout!r}; there are {', '.join(LAYOUTS)}")
        if unknown := set(self.parts) - set(KNOWN_SETS[self.known].parts if self.known else ()):
            raise ValueError(f"{self.name} has no part {min(unknown)!r}")
        if self.hub is not None and not (self.files and self.layout):
            raise ValueError(f"{self.hub} is not a known set: name its files and their layout")
        if self.local is not None and (self.revision or self.files):
            raise ValueError(f"revision and files are of sets on the hub; {self.local} is local")
        return self

    @property
    def name(self) -> str:
        """What its rows are called after."""
        return self.known or self.hub or self.local or ""

    def layout_for(self, makes: str) -> str:
        """The layout of its rows; for files without one: ours, of conversations or of problems."""
        if self.layout is not None:
            return self.layout
        return KNOWN_SETS[self.known].layout if self.known else f"{makes}s"


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


class CalibrationConfig(Config):
    """A calibration set."""

    sources: Sources
    """They take turns; a row of each at a time."""
    rows: Positive
    """How many conversations."""
    min_tokens: Positive = 1
    """Shorter conversations are left out."""
    max_tokens: Positive
    """Longer conversations are left out: a cut one would lose its reply."""
    efforts: Efforts | None = None
    """For conversations that do not say at which effort they were held, one of these each. None: they stay so."""


class ProblemsConfig(Config):
    """A problem set."""

    sources: Sources
    """They take turns; a problem of each at a time."""
    rows: Positive
    """How many problems."""
    max_tokens: Positive = 32_768
    """Problems whose prompt is longer are left out."""


class PrepareConfig(Config):
    """The data sets of a run. A problem is in one of the problem sets at most."""

    calibration_short: CalibrationConfig
    """Ranks experts and scores blocks."""
    calibration_long: CalibrationConfig
    """Scores blocks where answers depend on far context."""
    prompts: ProblemsConfig
    """What the parent answers for distillation, and policies are trained on: the training split."""
    tests: ProblemsConfig
    """What is evaluated on: the test split."""
    validation_rows: Annotated[int, Field(ge=0)] = 0
    """Problems of the same sources as the tests, and none of them, to make choices on: the validation split."""
    near: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Two texts are near duplicates from this similarity on (Jaccard, of their sequences of five words)."""
    seed: int = 0
    """Draws the rows."""

    @model_validator(mode="after")
    def _of_the_right_kind(self) -> Self:
        for name in ("calibration_short", "calibration_long", "prompts", "tests"):
            makes = "conversation" if name.startswith("calibration") else "problem"
            for source in getattr(self, name).sources:
                layout = source.layout_for(makes)
                if LAYOUTS[layout].makes != makes:
                    raise ValueError(f"{name} needs {makes}s; {source.name} is of the layout {layout!r}")
        return self

"""What is written before an answer, word by word, and what training makes of each word."""

from dataclasses import dataclass, field
from typing import Literal, Self

Kind = Literal["sure", "free", "slip"]
"""`sure`: follows from what stands before it; learnt and judged. `free`: drawn at random; learnt, not judged.
`slip`: an injected error; neither, so that nobody learns to err, but finding it is learnt."""


@dataclass
class Trace:
    """The words of one analysis, in order, each with its kind."""

    words: list[tuple[str, Kind]] = field(default_factory=list)

    def write(self, text: str, kind: Kind = "sure") -> Self:
        """Append the words of a text."""
        self.words += [(word, kind) for word in text.split()]
        return self

    @property
    def text(self) -> str:
        """The words alone."""
        return " ".join(word for word, _ in self.words)

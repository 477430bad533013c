"""Which version is the champion: a record of moves that has one order, read the same way by everyone.

A registry's aliases know no compare-and-set, so an alias alone cannot settle a race. The record can: moves are numbered
1, 2, 3, ... in the order in which they were written, each names the last move that its author knew, and it counts only
if no other has counted in between. Of moves made at the same time, the first one written counts and the others do not.

A promotion puts a version on top of the champions before it, a rollback takes the topmost away.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moesaic.core.errors import ArtifactError

Kind = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Move:
    """One entry of the record."""

    number: int
    """Its place in the order, from 1."""
    kind: Kind
    version: int
    """What becomes the champion by it."""
    after: int
    """The last move that counted, as its author knew it; 0 for none."""
    before: int | None
    """The champion that its author knew."""


@dataclass(frozen=True)
class History:
    """What the record says."""

    moves: tuple[Move, ...]
    """Those that count."""
    champions: tuple[int, ...]
    """The champion, last, and those that a rollback goes back to."""

    @property
    def last(self) -> int:
        """The number of the last move that counts; 0 for none."""
        return self.moves[-1].number if self.moves else 0

    @property
    def champion(self) -> int | None:
        """The version that is the champion now."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> int | None:
        """The champion before it."""
        return self.champions[-2] if len(self.champions) > 1 else None

    def has_promoted(self, version: int) -> bool:
        """Whether the version was made champion at some time."""
        return any(move.kind == "promote" and move.version == version for move in self.moves)


def replay(moves: Iterable[Move]) -> History:
    """Read the record from its start.

    Raises:
        ArtifactError: if an entry is missing, so that what came after it means nothing.
    """
    counted: list[Move] = []
    champions: list[int] = []
    for place, move in enumerate(sorted(moves, key=lambda move: move.number), 1):
        if move.number != place:
            raise ArtifactError(
                f"move {place} is missing from the record of promotions, so the champion cannot be told; "
                "delete the whole record to begin a new one with the alias as it is"
            )
        if move.after != (counted[-1].number if counted else 0):
            continue
        if not counted and move.before is not None:
            champions.append(move.before)
        if move.kind == "promote":
            champions.append(move.version)
        else:
            champions.pop()
            assert champions and champions[-1] == move.version, "a rollback goes to the champion before"
        counted.append(move)
    return History(tuple(counted), tuple(champions))

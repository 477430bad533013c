"""The record of promotions and rollbacks, from which every reader derives the same champion.

A registry's aliases have no compare-and-set, so an alias alone cannot settle a race. The record can. Its moves are
numbered 1, 2, 3, ... in the order in which they were written. Each names the last move that its author knew. A move
counts only if no other move has counted in between, so of moves made at the same time only the first one counts.

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
    """Position in the record, from 1."""
    kind: Kind
    champion: int
    """The number of the version that becomes the champion."""
    after: int
    """The number of the last counted move that the author knew; 0 for none."""
    before: int | None
    """The champion that the author knew; None for none."""


@dataclass(frozen=True)
class History:
    """The counted moves of the record, and the champions that follow from them."""

    moves: tuple[Move, ...]
    """The moves that count."""
    champions: tuple[int, ...]
    """Numbers of versions: the champion last, before it those that a rollback returns to."""

    @property
    def last(self) -> int:
        """The number of the last move that counts; 0 for none."""
        return self.moves[-1].number if self.moves else 0

    @property
    def champion(self) -> int | None:
        """The number of the present champion; None for none."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> int | None:
        """The number of the champion that a rollback returns to; None for none."""
        return self.champions[-2] if len(self.champions) > 1 else None

    def has_promoted(self, number: int) -> bool:
        """Whether a promotion has made this version champion."""
        return any(move.kind == "promote" and move.champion == number for move in self.moves)


def replay(moves: Iterable[Move]) -> History:
    """Derive the history from all moves of the record.

    Raises:
        ArtifactError: if a move is missing, so that the later ones cannot be interpreted.
    """
    counted: list[Move] = []
    champions: list[int] = []
    for number, move in enumerate(sorted(moves, key=lambda move: move.number), 1):
        if move.number != number:
            raise ArtifactError(
                f"move {number} is missing from the record of promotions, so the champion cannot be told; "
                "delete the whole record to begin a new one with the alias as it is"
            )
        if move.after != (counted[-1].number if counted else 0):
            continue
        if not counted and move.before is not None:
            champions.append(move.before)
        if move.kind == "promote":
            champions.append(move.champion)
        else:
            champions.pop()
            assert champions and champions[-1] == move.champion, "a rollback goes to the champion before"
        counted.append(move)
    return History(tuple(counted), tuple(champions))

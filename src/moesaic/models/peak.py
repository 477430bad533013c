"""The most that a device holds at once, by what it is."""

from collections.abc import Mapping
from dataclasses import dataclass

LAYERS, HEAD, BATCH = "layers", "output head", "a batch"
"""Where a model goes through a device layer by layer: a layer unpacked, and maybe the next one as it is stored; the
head; hidden states and all that is computed of them."""


@dataclass(frozen=True)
class Peak:
    """Bytes that are alive at once, by what they are."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

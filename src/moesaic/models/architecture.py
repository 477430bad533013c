"""What a child is: one block per layer (paper A, Fig. 2 and the released ``block_configs``).

A *block* is the pair of choices that may differ between layers: how many experts its mixture keeps, and how far its
attention looks back. An *architecture* is one block per layer. Both are plain values without tensors.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import ArtifactError, ConfigError


@dataclass(frozen=True, order=True)
class Block:
    """One layer's choices. ``window`` is the number of tokens attention sees, itself included; None sees them all."""

    num_experts: int
    window: int | None = None

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"a block needs at least 1 expert, got num_experts={self.num_experts}")
        if self.window is not None and self.window < 2:
            raise ConfigError(
                f"an attention window must be at least 2 tokens, got {self.window}; None means full attention"
            )

    @property
    def label(self) -> str:
        """Short text for tables and plots, such as ``64e/8192`` or ``128e/full``."""
        return f"{self.num_experts}e/{self.window or 'full'}"

    def as_config(self) -> dict[str, int | None]:
        """The entry this block has in a ``gpt_oss_puzzle`` config's ``block_configs``."""
        return {"num_local_experts": self.num_experts, "sliding_window": self.window}

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> "Block":
        """Read one entry of ``block_configs``."""
        try:
            experts, window = entry["num_local_experts"], entry["sliding_window"]
        except (KeyError, TypeError) as missing:
            raise ArtifactError(f"block_configs entry {entry} has no key {missing}") from missing
        if type(experts) is not int or type(window) not in (int, type(None)):
            raise ArtifactError(f"block_configs entry {entry} must have whole numbers, or null for a full window")
        return cls(experts, window)

    def narrows(self, other: "Block") -> bool:
        """Whether this block can be cut out of ``other``: no more experts, no longer view."""
        shorter = other.window is None or (self.window is not None and self.window <= other.window)
        return self.num_experts <= other.num_experts and shorter


@dataclass(frozen=True)
class Architecture:
    """One block per layer, in layer order."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> "Architecture":
        """Collect any iterable of blocks."""
        return cls(tuple(blocks))

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """Read what :meth:`to_json` wrote."""
        return cls.of(Block.from_config(entry) for entry in json.loads(text))

    def to_json(self) -> str:
        """The ``block_configs`` list as JSON text."""
        return json.dumps([block.as_config() for block in self.blocks])

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.blocks)

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(block.num_experts for block in self.blocks)

    @property
    def layouts(self) -> Counter[int | None]:
        """How many layers have each window; serving engines allocate KV memory by these groups."""
        return Counter(block.window for block in self.blocks)

    def replace(self, layer: int, block: Block) -> "Architecture":
        """A copy of this architecture with ``block`` in one layer."""
        return Architecture.of(block if index == layer else old for index, old in enumerate(self.blocks))

    def check_child_of(self, parent: "Architecture") -> None:
        """Raise ConfigError unless every block can be cut out of the parent's block in the same layer."""
        if self.num_layers != parent.num_layers:
            raise ConfigError(
                f"the child has {self.num_layers} layers, its parent {parent.num_layers}; they must agree"
            )
        for layer, (child, whole) in enumerate(zip(self.blocks, parent.blocks, strict=True)):
            if not child.narrows(whole):
                raise ConfigError(
                    f"layer {layer}: block {child.label} cannot be cut out of the parent's {whole.label}; "
                    "choose at most its experts and a window no longer than its own"
                )

"""What a child is: one block per layer (paper A, Fig. 2 and the released ``block_configs``).

A *block* is what may differ between layers: how many experts its mixture keeps, how many of them a token uses, how wide
each of them is, and how far its attention looks back. Each of these is an *axis*, declared once, as a field of
:class:`Block`: config entries, labels, checks, what can be cut out of what, the variants of a search and the tables of
a report follow from that. An *architecture* is one block per layer. All are plain values without tensors.

The paper's axes are experts and windows; experts per token and expert width are its successor's (arXiv 2607.04371).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from moesaic.core.errors import ArtifactError, ConfigError

ExpertOrder = Literal["order", "reap"]
"""What a layer of ``ranking.json`` calls the order by the search's own criterion, and that by REAP."""


@dataclass(frozen=True)
class Axis:
    """One choice that may differ between layers. A smaller value can be cut out of a larger one."""

    key: str
    """In an entry of ``block_configs``."""
    title: str
    """What people call it."""
    label: str
    """Its part of a block's label, with braces for the value."""
    least: int = 1
    """The smallest value."""
    unlimited: str | None = None
    """The word for None, which is larger than any number; None if the value must be a number."""
    of_experts: bool = False
    """Whether it is of the experts, and so 0 in a layer that has none."""

    def text(self, value: int | None) -> str:
        """A value as people read it."""
        return str(self.unlimited if value is None else value)

    def allows(self, value: object) -> bool:
        """Whether a value is of the right type; its size is another matter."""
        return type(value) is int or (value is None and self.unlimited is not None)


@dataclass(frozen=True)
class Block:
    """One layer's choices. A *dense* layer has no experts: every token takes the same way, which stays as it is."""

    num_experts: Annotated[int, Axis("num_local_experts", "experts", "{}e", of_experts=True)]
    """Experts of its mixture."""
    experts_per_token: Annotated[int, Axis("num_experts_per_tok", "experts per token", "top-{}", of_experts=True)]
    """Experts that each token uses."""
    expert_width: Annotated[int, Axis("intermediate_size", "expert width", "{}w", of_experts=True)]
    """Channels between the two projections of each expert."""
    window: Annotated[int | None, Axis("sliding_window", "window", "{}", least=2, unlimited="full")] = None
    """Tokens that attention sees, the token itself included; None sees them all."""

    def __post_init__(self) -> None:
        for (name, axis), value in zip(AXES.items(), self.values, strict=True):
            least = 0 if axis.of_experts and self.is_dense else axis.least
            if value is not None and value < least:
                none = f"; None means {axis.unlimited}" if axis.unlimited else ""
                raise ConfigError(f"a block needs {name} of at least {axis.least}, got {name}={value}{none}")
        if self.is_dense and self.expert_width:
            raise ConfigError(
                f"a block with num_experts=0 is dense, so expert_width={self.expert_width} means nothing; set it to 0"
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"a block of {self.num_experts} experts cannot use {self.experts_per_token} of them per token; "
                f"choose at most {self.num_experts}"
            )

    @classmethod
    def of(cls, values: Iterable[int | None]) -> "Block":
        """The block with these values on all axes, in their order."""
        named: dict[str, Any] = dict(zip(AXES, values, strict=True))
        return cls(**named)

    @property
    def is_dense(self) -> bool:
        """Whether the layer has no experts."""
        return self.num_experts == 0

    @property
    def values(self) -> tuple[int | None, ...]:
        """Its value on every axis."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def sizes(self) -> tuple[float, ...]:
        """The same as numbers that compare: no limit is infinite."""
        return tuple(math.inf if value is None else value for value in self.values)

    @property
    def label(self) -> str:
        """Short text for tables and plots, such as ``64e/top-4/2880w/8192`` or ``128e/top-4/2880w/full``."""
        pairs = zip(AXES.values(), self.values, strict=True)
        parts = [
            axis.label.format(axis.text(value)) for axis, value in pairs if not (axis.of_experts and self.is_dense)
        ]
        return "/".join(["dense", *parts] if self.is_dense else parts)

    def as_config(self) -> dict[str, int | None]:
        """The entry this block has in ``block_configs`` of a child's config."""
        return {axis.key: value for axis, value in zip(AXES.values(), self.values, strict=True)}

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> "Block":
        """Read one entry of ``block_configs``, which names every axis; other keys are passed over.

        Raises:
            ArtifactError: if a key is missing or its value of the wrong type.
            ConfigError: for a value out of range.
        """
        try:
            values = {name: entry[axis.key] for name, axis in AXES.items()}
        except (KeyError, TypeError) as missing:
            raise ArtifactError(f"block_configs entry {entry} has no key {missing}") from missing
        for name, axis in AXES.items():
            if not axis.allows(values[name]):
                allowed = "a whole number" + (f", or null for {axis.unlimited}" if axis.unlimited else "")
                raise ArtifactError(f"block_configs entry {entry}: {axis.key} must be {allowed}")
        return cls(**values)

    def narrows(self, other: "Block") -> bool:
        """Whether this block can be cut out of ``other``: on no axis has it more, and neither or both are dense."""
        return self.is_dense == other.is_dense and all(
            own <= whole for own, whole in zip(self.sizes, other.sizes, strict=True)
        )


AXES: Mapping[str, Axis] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Block, include_extras=True).items()
}
"""Every axis by the name of its field, in the order of the fields."""


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
    def experts_per_token(self) -> int:
        """Experts that a token uses in all layers together."""
        return sum(block.experts_per_token for block in self.blocks)

    @property
    def expert_width(self) -> int:
        """Channels of one expert of every layer together."""
        return sum(block.expert_width for block in self.blocks)

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
                    f"choose at most its own {', '.join(axis.title for axis in AXES.values())}"
                )

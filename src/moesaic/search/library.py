"""The block library: every layer's variants, each with its damage and its costs (paper B, "block library").

A *choice* is one variant index per layer, and so an architecture. Everything the search weighs is a *table*: one number
per layer and variant, of which an assembly pays the sum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.costs.block_costs import BlockCost, CostTable
from moesaic.models.architecture import AXES, Architecture, Block
from moesaic.models.families.family import check_packable
from moesaic.search.space import SearchSpace

Choice = tuple[int, ...]
Table = tuple[tuple[float, ...], ...]


def variants_of(block: Block, space: SearchSpace) -> tuple[Block, ...]:
    """What a parent block may be replaced by, itself first: every combination of its own and smaller values on offer.

    Raises:
        ConfigError: if the space does not fit the block.
    """
    too_few = [count for count in space.expert_counts if count < block.experts_per_token]
    if too_few:
        raise ConfigError(
            f"expert count {too_few[0]} is below the {block.experts_per_token} experts each token uses; "
            f"choose at least {block.experts_per_token}"
        )
    if block.num_experts % space.expert_parallel_size:
        raise ConfigError(
            f"the parent's {block.num_experts} experts cannot be spread over expert_parallel_size "
            f"{space.expert_parallel_size}; choose a divisor of {block.num_experts}"
        )
    offers = space.offers(block)
    smaller = (
        sorted({value for value in offers[name] if value < size}, reverse=True)
        for name, size in zip(AXES, block.sizes, strict=True)
    )
    options = ([own, *values] for own, values in zip(block.values, smaller, strict=True))
    return tuple(Block.of(values) for values in product(*options))


def check_storable(space: SearchSpace, packed: bool) -> None:
    """Raise ConfigError for a width on offer that the parent's expert format cannot store."""
    for width in space.expert_widths if packed else ():
        check_packable(width)


def distinct_blocks(parent: Architecture, space: SearchSpace) -> tuple[Block, ...]:
    """The blocks that occur among all layers' variants, each once, in order of first use."""
    return tuple(dict.fromkeys(variant for block in parent.blocks for variant in variants_of(block, space)))


@dataclass(frozen=True)
class BlockLibrary:
    """Per layer its variants, with the damage of each and the costs they share between layers."""

    parent: Architecture
    variants: tuple[tuple[Block, ...], ...]
    damages: Table
    costs: CostTable

    @classmethod
    def of(cls, parent: Architecture, damages: Mapping[tuple[int, Block], float], costs: CostTable) -> "BlockLibrary":
        """Join scores and costs.

        Args:
            parent: the parent's own blocks; each must be among its layer's variants.
            damages: by layer and block; these are the variants on offer.
            costs: must cover every block of ``damages``.

        Raises:
            ArtifactError: if the two do not describe the same variants of the same parent.
        """
        if costs.parent != parent:
            raise ArtifactError("scores and costs are of different parents; let both stages read the same model")
        rows: list[dict[Block, float]] = [{} for _ in parent.blocks]
        for (layer, block), damage in damages.items():
            if layer not in range(parent.num_layers):
                raise ArtifactError(f"scores have a row for layer {layer}, the parent has {parent.num_layers} layers")
            if block not in costs.blocks:
                raise ArtifactError(
                    f"layer {layer}: block {block.label} is scored but not in the cost table, which has "
                    f"{', '.join(known.label for known in costs.blocks)}; give both stages the same search space"
                )
            rows[layer][block] = damage
        for layer, (row, block) in enumerate(zip(rows, parent.blocks, strict=True)):
            if block not in row:
                raise ArtifactError(f"scores have no row for layer {layer} as it is in the parent, {block.label}")
            outside = [variant.label for variant in row if not variant.narrows(block)]
            if outside:
                raise ArtifactError(f"layer {layer}: {outside[0]} cannot be cut out of the parent's {block.label}")
        return cls(parent, tuple(tuple(row) for row in rows), tuple(tuple(row.values()) for row in rows), costs)

    @property
    def num_layers(self) -> int:
        """How many layers the parent has."""
        return self.parent.num_layers

    @property
    def parent_choice(self) -> Choice:
        """The choice that changes nothing."""
        return self.choice(self.parent)

    def choice(self, architecture: Architecture) -> Choice:
        """The index of each of an architecture's blocks among its layer's variants."""
        return tuple(options.index(block) for options, block in zip(self.variants, architecture.blocks, strict=True))

    def architecture(self, choice: Choice) -> Architecture:
        """The blocks a choice stands for."""
        return Architecture.of(options[index] for options, index in zip(self.variants, choice, strict=True))

    def cost_table(self, value: Callable[[BlockCost], float]) -> Table:
        """One cost of every variant of every layer."""
        return self.table(lambda block: value(self.costs.blocks[block]))

    def table(self, value: Callable[[Block], float]) -> Table:
        """One number for every variant of every layer."""
        return tuple(tuple(value(block) for block in options) for options in self.variants)


def total(table: Table, choice: Choice) -> float:
    """What an assembly pays of a table."""
    return sum(row[index] for row, index in zip(table, choice, strict=True))

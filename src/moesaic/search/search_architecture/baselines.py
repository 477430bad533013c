"""What the search is compared with, under the same limits (paper B, section on the effectiveness of its MIP).

greedy          from the parent, take again and again the replacement of one layer with the least added damage per
                excess it removes, excess being the sum over limits of the share by which each is exceeded, until all
                limits hold. Paper B describes its greedy search only in words; this reading is ours.
uniform         one value for all layers on every axis but the window, and one window for evenly spread full layers: of
                all that keep the limits, the one of least damage, so that the comparison is with the best of its kind.
random          one notch at a time (the next smaller value on one axis) in a random layer until all limits hold.
max_parameters  the MIP with parameters to maximise; damage is not looked at.

Greedy and random may end where no step helps although the limits can be kept; the reason is then reported.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import numpy as np

from moesaic.core.errors import InfeasibleError
from moesaic.models.architecture import AXES, Block
from moesaic.search.library import BlockLibrary, Choice, total
from moesaic.search.limits import TOLERANCE, GroupedCache, LimitSet
from moesaic.search.search_architecture.infeasibility import explain_infeasible
from moesaic.search.search_architecture.search import Search, Solution
from moesaic.search.solver.decomposition import minimise
from moesaic.search.solver.lagrangian import Floats, Indices, Mask, dense
from moesaic.search.solver.mip import branch_and_bound


def baselines(search: Search) -> dict[str, Callable[[], Solution]]:
    """Every baseline by name, to be called; an InfeasibleError says why one cannot keep the limits."""
    seeds = search.config.random_seeds
    return {
        "greedy": lambda: search.assembled(choose_greedily(search)),
        "uniform": lambda: search.assembled(choose_uniformly(search)),
        "max_parameters": lambda: keep_most_parameters(search),
    } | {f"random-{seed}": partial(_random, search, seed) for seed in seeds}


def _random(search: Search, seed: int) -> Solution:
    return search.assembled(shrink_randomly(search, seed))


def choose_greedily(search: Search) -> Choice:
    """The greedy baseline's choice; it is also the solver's first incumbent."""
    library, limits = search.library, search.limits
    damages, steps = dense(library.damages, np.inf), _Steps.of(library)
    choice = np.array(library.parent_choice)
    now = np.arange(len(choice))
    excesses = _Excesses.of(limits)
    while excess := limits.excess(tuple(choice.tolist())):
        removed = np.where(steps.narrower(choice), excess - excesses.after(choice), 0.0)
        layers, variants = np.nonzero(removed > 0)
        if not len(layers):
            why = "no replacement of one layer comes closer"
            raise InfeasibleError(_stuck("greedy", why, limits, tuple(choice.tolist())))
        decrease = removed[layers, variants]
        added = damages[layers, variants] - damages[now, choice][layers]
        # Of equals the one that comes first when assemblies are written as tuples: layers that grow, from the last.
        grows = variants > choice[layers]
        best = np.lexsort((variants, np.where(grows, -layers, layers), grows, -decrease, added / decrease))[0]
        choice[layers[best]] = variants[best]
    return tuple(choice.tolist())


@dataclass(frozen=True, eq=False)
class _Steps:
    """The sizes of all variants, to tell which replace which."""

    sizes: Floats
    """By layer, variant and axis."""

    @classmethod
    def of(cls, library: BlockLibrary) -> "_Steps":
        """The sizes of a library's variants, as an array; what a layer does not have is larger than all."""
        tables = (library.table(partial(_size, place)) for place in range(len(AXES)))
        return cls(np.stack([dense(table, np.inf) for table in tables], axis=-1))

    def narrower(self, choice: Indices) -> Mask:
        """Which variants narrow the block that their layer has."""
        return _narrower(self.sizes, self.sizes[np.arange(len(choice)), choice][:, None])


def _size(place: int, block: Block) -> float:
    return block.sizes[place]


def _narrower(sizes: Floats, of: Floats) -> Mask:
    """Whether blocks narrow others, given the sizes of both, with axes last."""
    narrower: Mask = (sizes <= of).all(-1) & (sizes != of).any(-1)
    return narrower


@dataclass(frozen=True, eq=False)
class _Excesses:
    """How far every assembly that differs from a given one in one layer exceeds the limits."""

    limits: LimitSet
    usage: list[Floats]
    windows: Indices
    """By layer and variant, as an index of ``names``."""
    names: list[int | None]

    @classmethod
    def of(cls, limits: LimitSet) -> "_Excesses":
        """The limits' usage and windows, as arrays."""
        names = list({window: None for row in limits.windows for window in row})
        numbers = tuple(tuple(float(names.index(window)) for window in row) for row in limits.windows)
        windows = dense(numbers).astype(np.int64)
        return cls(limits, [dense(limit.usage) for limit in limits.linear], windows, names)

    def after(self, choice: Indices) -> Floats:
        """By layer and variant that the layer would have instead; see ``LimitSet.excess``."""
        now = np.arange(len(choice)), choice
        excess = np.zeros(self.windows.shape)
        old = self.windows[now]
        counts = np.bincount(old, minlength=len(self.names))
        moved = old[:, None] != self.windows
        for limit, usage in zip(self.limits.linear, self.usage, strict=True):
            used = limit.used(tuple(choice.tolist())) + usage - usage[now][:, None]
            if limit.cache:
                used += self._moved(limit.cache, counts)[old[:, None], self.windows]
            over = (used - limit.bound) / max(abs(limit.bound), 1e-12)
            excess += np.where(over > TOLERANCE, over, 0.0)
        if self.limits.max_layouts is not None:
            lost, won = (counts[old] == 1)[:, None], (counts == 0)[self.windows]
            layouts = (counts > 0).sum() + moved * (won.astype(float) - lost)
            excess += np.maximum(0, layouts / self.limits.max_layouts - 1)
        return excess

    def _moved(self, cache: GroupedCache, counts: Indices) -> Floats:
        """By window of ``names`` that one layer leaves, and the one it takes: what that adds."""
        layout = Counter(dict(zip(self.names, counts.tolist(), strict=True)))
        before = cache.of(+layout)

        def added(old: int | None, new: int | None) -> float:
            return cache.of(layout - Counter([old]) + Counter([new])) - before if layout[old] else 0.0

        return np.array([[added(old, new) for new in self.names] for old in self.names])


def choose_uniformly(search: Search) -> Choice:
    """The uniform baseline's choice."""
    choices = dict.fromkeys(_uniform(search.library))
    for _, choice in sorted((total(search.library.damages, choice), choice) for choice in choices):
        if search.limits.holds(choice):
            return choice
    raise InfeasibleError("uniform: no block for all layers, with one window in evenly spread ones, is enough")


def _uniform(library: BlockLibrary) -> Iterator[Choice]:
    """Every block in all layers, with every window in any number of evenly spread full layers, if on offer.

    Dense layers have no other block than their own, with that window.
    """
    places = [{block: index for index, block in enumerate(options)} for options in library.variants]
    offered = dict.fromkeys(block for options in library.variants for block in options)
    kinds = dict.fromkeys(replace(block, window=None) for block in offered if not block.is_dense)
    windows: Sequence[int | None] = sorted({block.window for block in offered if block.window is not None})
    parent = library.parent.blocks
    full = [layer for layer, block in enumerate(parent) if block.window is None]
    for kind, window in product(kinds, windows or [None]):
        alike = [block if block.is_dense else replace(kind, window=block.window) for block in parent]
        whole = [place.get(block) for place, block in zip(places, alike, strict=True)]
        narrow = [place.get(replace(block, window=window)) for place, block in zip(places, alike, strict=True)]
        for turned in range(len(full) + 1):
            mixed = whole.copy()
            for layer in {full[int((index + 0.5) * len(full) / turned)] for index in range(turned)}:
                mixed[layer] = narrow[layer]
            choice = tuple(index for index in mixed if index is not None)
            if len(choice) == len(mixed):
                yield choice


def shrink_randomly(search: Search, seed: int) -> Choice:
    """The random baseline's choice for a seed."""
    generator = random.Random(seed)
    notches = [_notches(options) for options in search.library.variants]
    choice = list(search.library.parent_choice)
    while not search.limits.holds(tuple(choice)):
        steps = [(layer, index) for layer, now in enumerate(choice) for index in notches[layer][now]]
        if not steps:
            why = "every layer is as small as it gets"
            raise InfeasibleError(_stuck(f"random-{seed}", why, search.limits, tuple(choice)))
        layer, index = generator.choice(steps)
        choice[layer] = index
    return tuple(choice)


@cache
def _notches(options: tuple[Block, ...]) -> list[list[int]]:
    """For every block those that narrow it with nothing on offer in between."""
    sizes = np.array([block.sizes for block in options])
    narrower = _narrower(sizes, sizes[:, None])
    steps = narrower.astype(np.float32)
    return [np.flatnonzero(row).tolist() for row in narrower & (steps @ steps == 0)]


def keep_most_parameters(search: Search) -> Solution:
    """The max-parameters baseline.

    Many assemblies have equally many parameters and reduced costs tell little of them: branch and bound goes alone.
    """
    fewer = search.library.cost_table(lambda cost: -float(cost.parameters))
    outcome = minimise(fewer, search.limits, search.effort, solve=branch_and_bound)
    if outcome is None:
        raise InfeasibleError(explain_infeasible(search.limits, search.effort))
    return search.solved(outcome, objective="-parameters")


def _stuck(name: str, why: str, limits: LimitSet, choice: Choice) -> str:
    return f"{name}: {why}, and still broken is {'; '.join(limits.broken(choice))}"

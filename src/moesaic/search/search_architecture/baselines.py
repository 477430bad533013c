"""What the search is compared with, at equal cost (paper B, section on the effectiveness of its MIP).

These keep the search's limits:

uniform         one value for all layers on every axis but the window, and one window for evenly spread full layers: of
                all that keep the limits, the one of least damage, so that the comparison is with the best of its kind.
uniform_reap    equally many experts in all layers, kept by REAP (Lasby et al., arXiv 2510.13999), whole; windows as in
                uniform. Scores are of the search's own order, so its damage is not known.
uniform_width   equally narrow experts in all layers, all of them, used as the parent does; windows as in uniform.
greedy          from the parent, take again and again the replacement of one layer with the least added damage per
                excess it removes, excess being the sum over limits of the share by which each is exceeded, until all
                limits hold. Paper B describes its greedy search only in words; this reading is ours.
random          one notch at a time (the next smaller value on one axis) in a random layer until all limits hold.
max_parameters  the MIP with parameters to maximise; damage is not looked at.

These are as cheap as the search's choice in one respect alone, by the same costs:

uniform_memory      the uniform one of least damage, of those that take no more memory than it under any workload.
uniform_throughput  the same, of those that are no slower than it under any workload.

Greedy and random may end where no step helps although the limits can be kept; the reason is then reported.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Literal

import numpy as np

from moesaic.core.errors import InfeasibleError
from moesaic.models.architecture import AXES, Block
from moesaic.search.library import BlockLibrary, Choice, total
from moesaic.search.limits import TOLERANCE, GroupedCache, LimitSet
from moesaic.search.search_architecture.infeasibility import explain_infeasible
from moesaic.search.search_architecture.search import Search, Solution
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.solver.decomposition import minimise
from moesaic.search.solver.lagrangian import Floats, Indices, Mask, dense
from moesaic.search.solver.mip import branch_and_bound

_SHAPE = tuple(axis for axis in AXES if axis != "window")
"""Axes on which a uniform assembly has one value."""


def baselines(search: Search, child: Solution) -> dict[str, Callable[[], Solution]]:
    """The config's baselines by name, to be called; an InfeasibleError says why one cannot be had.

    Args:
        search: what all share.
        child: the search's choice.
    """
    makers: dict[str, Callable[[], Solution]] = {
        "uniform": lambda: search.assembled(choose_uniformly(search)),
        "uniform_reap": lambda: keep_by_reap(search),
        "uniform_width": lambda: search.assembled(choose_uniformly(search, ["expert_width"])),
        "uniform_memory": lambda: match_cost(search, child, "memory_mib"),
        "uniform_throughput": lambda: match_cost(search, child, "throughput_tokens_per_s"),
        "greedy": lambda: search.assembled(choose_greedily(search)),
        "max_parameters": lambda: keep_most_parameters(search),
    }
    named = {name: make for name, make in makers.items() if name in search.config.baselines}
    return named | {f"random-{seed}": partial(_random, search, seed) for seed in search.config.random_seeds}


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


def choose_uniformly(search: Search, axes: Sequence[str] = _SHAPE) -> Choice:
    """The uniform assembly of least damage within the limits.

    Args:
        search: its library and limits.
        axes: what has one value in all layers; else, windows aside, every layer is as in the parent.

    Raises:
        InfeasibleError: if there is none.
    """
    choices = dict.fromkeys(_uniform(search.library, axes))
    for _, choice in sorted((total(search.library.damages, choice), choice) for choice in choices):
        if search.limits.holds(choice):
            return choice
    titles = ", ".join(AXES[axis].title for axis in axes)
    raise InfeasibleError(
        f"nothing on offer to all layers ({titles}), with one window in evenly spread ones, is enough"
    )


def keep_by_reap(search: Search) -> Solution:
    """The baseline of equally many experts in all layers, kept by REAP where some go."""
    solution = search.assembled(choose_uniformly(search, ["num_experts"]))
    is_whole = solution.architecture.num_experts == search.library.parent.num_experts
    return solution if is_whole else replace(solution, keeps="reap")


def match_cost(search: Search, child: Solution, cost: Literal["memory_mib", "throughput_tokens_per_s"]) -> Solution:
    """The baseline that is uniform and, by one cost alone, at least as cheap as the child under every workload."""
    limits = {name: Limits.model_validate({cost: figure}) for name, figure in getattr(child.cost, cost).items()}
    if not limits:
        raise InfeasibleError("no workload was costed")
    config = SearchArchitectureConfig(limits=limits, max_layouts=search.config.max_layouts)
    alone = Search.of(search.library, config)
    solution = alone.assembled(choose_uniformly(alone))
    return replace(solution, breaks=tuple(search.limits.broken(solution.choice)))


def _uniform(library: BlockLibrary, axes: Sequence[str]) -> Iterator[Choice]:
    """One value on each axis for all layers, every window in any number of evenly spread full ones, if on offer.

    Dense layers have no other block than their own, with that window.
    """
    places = [{block.values: index for index, block in enumerate(options)} for options in library.variants]
    offered = dict.fromkeys(block for options in library.variants for block in options)
    kinds = dict.fromkeys(tuple(getattr(block, axis) for axis in axes) for block in offered if not block.is_dense)
    windows: Sequence[int | None] = sorted({block.window for block in offered if block.window is not None})
    parent = library.parent.blocks
    full = [layer for layer, block in enumerate(parent) if block.window is None]

    def find(changed: dict[str, int | None]) -> list[int | None]:
        """Of every layer the variant that has these values and else the parent's; None if that is not on offer."""
        window = {axis: value for axis, value in changed.items() if axis == "window"}
        wanted = (dict(zip(AXES, own.values, strict=True)) | (window if own.is_dense else changed) for own in parent)
        return [place.get(tuple(values.values())) for place, values in zip(places, wanted, strict=True)]

    for kind, window in product(kinds, windows or [None]):
        alike: dict[str, int | None] = dict(zip(axes, kind, strict=True))
        whole, narrow = find(alike), find(alike | {"window": window})
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

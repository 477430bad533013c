"""Local search: better choices near a known one, and the proof that there are none (local branching).

Some layers are chosen anew, all others keep their variants. By the identity of :mod:`moesaic.search.solver.lagrangian`
a choice ``x`` is better than the known ``y`` only if the layers ``S`` chosen anew satisfy

    sum_{i in S} reduced[i, x_i]  <  budget  =  cost(y) - bound - sum_{i not in S} reduced[i, y_i]

which few combinations do. The combinations of each half of the layers are listed, and the two lists are combined: of
all pairs within the budget and the limits the cheapest is taken (meet in the middle). Lists are cut at a length,
smallest sums first. If all layers are chosen anew and no list is cut, the choice is proven optimal.

Work is counted in pairs, not in seconds, and the layers are drawn with a fixed seed, so results repeat.

Source: local branching, Fischetti and Lodi, 2003; meet in the middle, Horowitz and Sahni, 1974. Not from paper B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from moesaic.search.library import Choice
from moesaic.search.solver.lagrangian import ROUNDING, Floats, Indices, Program, Relaxation

PROOF_SHARE = 256
"""How many times longer lists may be in a proof, where all layers are chosen anew."""
PROOF_PAIRS = 64
"""How many times more pairs a proof may look at than two full lists have."""
PAIRS_AT_ONCE = 65_536
"""Pairs computed at once; so many stay in the processor's cache."""
SIZES = (4, 6, 8, 12, 18, 27, 40)
"""How many layers are chosen anew: these numbers in order, again and again."""
PATIENCE = 10
"""Rounds through all sizes without a better choice after which the search ends."""


@dataclass(frozen=True)
class LocalOptimum:
    """The best choice that local search reached; it need not keep the limits."""

    choice: Choice
    proven: bool
    """Whether an exhaustive search showed that there is no better one. False also where the bound alone proves it."""


@dataclass(frozen=True, eq=False)
class _Combinations:
    """Combinations of some layers' variants, in order of their sum of reduced costs."""

    layers: Sequence[int]
    reduced: Floats
    usage: Floats
    """By limit and combination."""
    steps: list[tuple[Indices, Indices]]
    """Per layer and combination: which combination of the layers before it extends, and by which variant."""
    order: Indices
    complete: bool
    """Whether all within the budget are there."""

    def variants(self, index: int) -> dict[int, int]:
        """One combination as variants by layer."""
        at, chosen = int(self.order[index]), {}
        for layer, (parents, variants) in zip(reversed(self.layers), reversed(self.steps), strict=True):
            chosen[layer] = int(variants[at])
            at = int(parents[at])
        return chosen


class Neighbourhoods:
    """A choice that is improved step by step, and the work this has taken."""

    def __init__(self, program: Program, relaxation: Relaxation, start: Choice | None) -> None:
        self.program, self.relaxation = program, relaxation
        self.variants = [np.argsort(row, kind="stable")[: np.isfinite(row).sum()] for row in relaxation.reduced]
        self.choice = np.array(relaxation.rounded if start is None else start)
        self.pairs = 0

    @property
    def violation(self) -> float:
        """The sum over limits of the share by which each is exceeded."""
        over = np.maximum(self.program.used(tuple(self.choice)) - self.program.room, 0.0)
        return float((over / self._scale).sum())

    @property
    def _scale(self) -> Floats:
        return np.maximum(np.abs(self.program.room), ROUNDING)

    @property
    def distance(self) -> float:
        """How far the choice is above the bound."""
        return self.program.cost_of(tuple(self.choice)) - self.relaxation.bound

    def is_within(self, relative_gap: float) -> bool:
        """Whether the choice keeps the limits and is proven within the gap by the bound alone."""
        cost = self.program.cost_of(tuple(self.choice))
        return self.violation == 0 and cost - self.relaxation.bound <= max(relative_gap, ROUNDING) * abs(cost)

    def improve(self, layers: Sequence[int], length: int) -> None:
        """Choose some layers anew: the cheapest pair of the lists or, if the limits are broken, the nearest to them."""
        holds = self.violation == 0
        budget = self.distance - self._reduced_outside(layers) if holds else np.inf
        first, second = (self._combine(half, budget, length) for half in (layers[::2], layers[1::2]))
        self._take(
            first, second, self._best_pair(first, second, budget) if holds else self._nearest_pair(first, second)
        )

    def prove(self, length: int) -> bool:
        """Choose all layers anew; whether the choice is now proven optimal. Does nothing if that is too much work."""
        budget = self.distance
        layers = np.argsort((self.relaxation.reduced <= budget).sum(axis=1), kind="stable").tolist()
        halves = []
        for half in (layers[::2], layers[1::2]):
            halves.append(self._combine(half, budget, PROOF_SHARE * length, cut=False))
            if not halves[-1].complete:
                return False
        first, second = halves
        if _num_pairs(first, second, budget) > PROOF_PAIRS * length**2:
            return False
        self._take(first, second, self._best_pair(first, second, budget))
        return True

    def _take(self, first: _Combinations, second: _Combinations, pair: tuple[int, int] | None) -> None:
        for half, index in zip((first, second), pair or (), strict=False):
            for layer, variant in half.variants(index).items():
                self.choice[layer] = variant

    def _reduced_outside(self, layers: Sequence[int]) -> float:
        others = np.setdiff1d(np.arange(self.program.num_layers), layers)
        return float(self.relaxation.reduced[others, self.choice[others]].sum())

    def _room(self, layers: Sequence[int]) -> Floats:
        """What the other layers leave of each limit."""
        chosen = self.program.usage[:, layers, self.choice[list(layers)]].sum(axis=1)
        room: Floats = self.program.room - self.program.used(tuple(self.choice)) + chosen
        return room

    def _combine(self, layers: Sequence[int], budget: float, length: int, cut: bool = True) -> _Combinations:
        """All combinations within the budget; if there are more than ``length``, the best of them or, uncut, none."""
        reduced, usage = np.zeros(1), np.zeros((len(self.program.room), 1))
        steps: list[tuple[Indices, Indices]] = []
        complete = True
        for layer in layers:
            variants = self.variants[layer]
            offered = self.relaxation.reduced[layer, variants]
            offered = offered[: np.searchsorted(offered, budget, side="right")]
            sums = reduced[:, None] + offered[None, :]
            parents, columns = np.nonzero(sums <= budget)
            sums = sums[parents, columns]
            if len(sums) > length:
                complete = False
                if not cut:
                    break
                cheapest = np.argpartition(sums, length)[:length]
                parents, columns, sums = parents[cheapest], columns[cheapest], sums[cheapest]
            reduced = sums
            usage = usage[:, parents] + self.program.usage[:, layer, variants[columns]]
            steps.append((parents, variants[columns]))
        order = np.argsort(reduced, kind="stable")
        return _Combinations(layers, reduced[order], usage[:, order], steps, order, complete)

    def _best_pair(self, first: _Combinations, second: _Combinations, budget: float) -> tuple[int, int] | None:
        """The cheapest pair below the budget that keeps the limits, if there is one."""
        room, prices = self._room([*first.layers, *second.layers]), self.relaxation.prices
        budget -= ROUNDING * abs(self.relaxation.bound)
        best, row = None, 0
        # A pair's cost above the bound, up to a constant: reduced costs, and the price of the room it leaves.
        costs = [half.reduced - prices @ half.usage for half in (first, second)]
        constant = prices @ room
        while row < len(first.reduced):
            width = int(np.searchsorted(second.reduced, budget - first.reduced[row]))
            if not width:
                break
            rows = slice(row, row + max(1, PAIRS_AT_ONCE // width))
            left = room[:, None] - first.usage[:, rows]
            cost = costs[0][rows, None] + (costs[1][:width] + constant)
            for limit, used in enumerate(second.usage[:, :width]):
                cost[left[limit][:, None] < used] = np.inf
            self.pairs += cost.size
            at = int(cost.argmin())
            if cost.flat[at] < budget:
                budget = float(cost.flat[at])
                best = (row + at // width, at % width)
            row = rows.stop
        return best

    def _nearest_pair(self, first: _Combinations, second: _Combinations) -> tuple[int, int]:
        """The pair that exceeds the limits least, of these the one with the least reduced costs."""
        room = self._room([*first.layers, *second.layers])
        over = np.zeros((len(first.reduced), len(second.reduced)))
        for limit, scale in enumerate(self._scale):
            more = first.usage[limit][:, None] + second.usage[limit] - room[limit]
            over += np.maximum(more, 0.0) / scale
        self.pairs += over.size
        cost = np.where(over <= over.min(), first.reduced[:, None] + second.reduced, np.inf)
        row, column = np.unravel_index(int(cost.argmin()), cost.shape)
        return int(row), int(column)


def _num_pairs(first: _Combinations, second: _Combinations, budget: float) -> int:
    """How many pairs are within the budget."""
    return int(np.searchsorted(second.reduced, budget - first.reduced).sum())


def improve_choice(
    program: Program, relaxation: Relaxation, start: Choice | None, relative_gap: float, length: int, most_pairs: float
) -> LocalOptimum:
    """Improve a choice until it is within the gap or nothing improves it, then try to prove that it is optimal.

    Args:
        program: what is chosen and under which limits.
        relaxation: its bound.
        start: a choice to begin with; the rounded one of the relaxation if None.
        relative_gap: how near to the bound is near enough.
        length: how many combinations of one half of a neighbourhood to list.
        most_pairs: how much work at most.
    """
    search = Neighbourhoods(program, relaxation, start)
    generator = np.random.default_rng(0)
    stale, sizes = 0, cycle(SIZES)
    while stale <= PATIENCE * len(SIZES) and search.pairs < most_pairs and not search.is_within(relative_gap):
        before = (search.violation, search.distance)
        search.improve(generator.permutation(program.num_layers)[: next(sizes)].tolist(), length)
        stale = 0 if (search.violation, search.distance) < before else stale + 1
    unproven = search.violation == 0 and not search.is_within(relative_gap)
    proven = unproven and search.pairs < most_pairs and search.prove(length)
    return LocalOptimum(tuple(search.choice.tolist()), proven)

"""Lagrangian relaxation of the search's program: a lower bound, and which variants a better assembly may have.

    min  sum_i cost[i, x_i]      subject to    sum_i usage[k, i, x_i] <= room[k]    for every limit k

With a price ``p[k] >= 0`` on every limit (its Lagrange multiplier) the layers can be minimised one by one:

    reduced[i, j] = cost[i, j] + sum_k p[k] usage[k, i, j] - least[i]        least[i]: the smallest of layer i
    bound         = sum_i least[i] - sum_k p[k] room[k]   <=   the optimum

and every choice ``x`` pays exactly

    sum_i cost[i, x_i] = bound + sum_i reduced[i, x_i] + sum_k p[k] (room[k] - sum_i usage[k, i, x_i])

All three terms after the equality are known not to be negative for a choice that keeps the limits. So a variant whose
reduced cost exceeds the distance of a known choice to the bound is in no better choice, and a better choice's reduced
costs sum to less than that distance. The best prices are the duals of the linear program with fractional choices; the
bound is computed from them here and holds whatever their errors are.

Source: Lagrangian relaxation and reduced cost fixing as in Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004;
not from paper B.
"""

from dataclasses import dataclass, replace

import highspy
import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import StageError
from moesaic.search.library import Choice, Table

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.integer]
ROUNDING = 1e-12
"""Share of a number that sums of floats may be off by."""


@dataclass(frozen=True, eq=False)
class Program:
    """The program above. Layers may have different numbers of variants: those missing cost infinitely much."""

    cost: Floats
    """By layer and variant."""
    usage: Floats
    """By limit, layer and variant."""
    room: Floats
    """By limit."""

    @property
    def num_layers(self) -> int:
        """How many layers choose."""
        return len(self.cost)

    def only(self, kept: Mask) -> "Program":
        """The program restricted to these variants."""
        return replace(self, cost=np.where(kept, self.cost, np.inf))

    def cost_of(self, choice: Choice) -> float:
        """What a choice pays."""
        return float(self.cost[np.arange(self.num_layers), list(choice)].sum())

    def used(self, choice: Choice) -> Floats:
        """What a choice uses of each limit."""
        used: Floats = self.usage[:, np.arange(self.num_layers), list(choice)].sum(axis=1)
        return used

    def holds(self, choice: Choice) -> bool:
        """Whether a choice keeps the limits."""
        return bool((self.used(choice) <= self.room).all())


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The best prices with their bound."""

    prices: Floats
    bound: float
    reduced: Floats
    """By layer and variant; infinite for those missing."""
    rounded: Choice
    """The variant with the largest share in every layer; it need not keep the limits."""

    def forced(self) -> Floats:
        """A bound on every choice with this variant, by layer and variant."""
        return self.bound + self.reduced


def dense(table: Table, missing: float = 0.0) -> Floats:
    """A table as an array, with ``missing`` where a layer has fewer variants than others."""
    width = max(map(len, table))
    return np.array([[*row, *[missing] * (width - len(row))] for row in table], dtype=np.float64)


def relax(program: Program) -> Relaxation | None:
    """Find the best prices; None if not even fractional choices keep the limits."""
    layers, variants = np.nonzero(np.isfinite(program.cost))
    if len(np.unique(layers)) < program.num_layers:
        return None
    prices, shares = _solve(program, layers, variants)
    if prices is None:
        return None
    priced = program.cost + np.tensordot(prices, program.usage, axes=1)
    least = priced.min(axis=1)
    bound = float(least.sum() - prices @ program.room)
    share = np.full(program.cost.shape, -1.0)
    share[layers, variants] = shares
    rounded = tuple(int(index) for index in share.argmax(axis=1))
    return Relaxation(prices, bound, priced - least[:, None], rounded)


def _solve(program: Program, layers: Indices, variants: Indices) -> tuple[Floats | None, Floats]:
    """Duals of the limits and the shares of the variants; None if infeasible."""
    num_limits, num_columns = len(program.room), len(layers)
    cost, usage = program.cost[layers, variants], program.usage[:, layers, variants]
    cost_scale, scale = _largest(cost), _largest(usage.T)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = num_columns, program.num_layers + num_limits
    model.col_cost_ = cost / cost_scale
    model.col_lower_, model.col_upper_ = np.zeros(num_columns), np.full(num_columns, highspy.kHighsInf)
    ones, nothing = np.ones(program.num_layers), np.full(num_limits, -highspy.kHighsInf)
    model.row_lower_ = np.concatenate([ones, nothing])
    model.row_upper_ = np.concatenate([ones, program.room / scale])
    matrix = model.a_matrix_
    matrix.format_, matrix.start_ = highspy.MatrixFormat.kColwise, np.arange(num_columns + 1) * (num_limits + 1)
    limits = np.broadcast_to(program.num_layers + np.arange(num_limits), (num_columns, num_limits))
    matrix.index_ = np.column_stack([layers, limits]).ravel()
    matrix.value_ = np.column_stack([np.ones(num_columns), (usage / scale[:, None]).T]).ravel()
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(model)
    solver.run()
    status, solution = solver.getModelStatus(), solver.getSolution()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None, np.zeros(0)
    if status != highspy.HighsModelStatus.kOptimal:
        raise StageError(f"HiGHS could not solve the relaxed search (status {solver.modelStatusToString(status)})")
    duals = np.array(solution.row_dual)[program.num_layers :] * cost_scale / scale
    return np.maximum(-duals, 0.0), np.array(solution.col_value)


def _largest(values: Floats) -> Floats:
    """The largest magnitude over the first axis, one where all are zero."""
    largest = np.abs(values).max(axis=0)
    return np.where(largest > 0, largest, 1.0)


def undominated(program: Program, groups: Indices) -> Mask:
    """Which variants no other of their layer and group beats in cost and in every limit at once.

    Of equal variants the first is kept.

    Args:
        program: what variants cost and use.
        groups: by layer and variant; those of different groups are not compared.
    """
    kept = np.isfinite(program.cost)
    for layer, (row, group) in enumerate(zip(kept, groups, strict=True)):
        present = np.flatnonzero(row)
        values = np.vstack([program.cost[layer, present], program.usage[:, layer, present]])
        better = (values[:, :, None] <= values[:, None, :]).all(axis=0)
        better &= group[present][:, None] == group[present][None, :]
        equal = better & better.T
        row[present] = ~(better & ~np.tril(equal)).any(axis=0)
    return kept

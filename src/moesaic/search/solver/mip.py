"""The mixed-integer program on HiGHS (paper B, its MIP): one variant per layer, least objective, every limit kept.

    min  sum_i objective[i, j] x[i, j]      x binary, sum_j x[i, j] = 1 for every layer i
    s.t. fixed + sum usage[i, j] x[i, j] <= bound                       for every limit
         x[i, j] <= y[window of (i, j)],  sum_w y[w] <= max_layouts     y binary, the windows in use

Rows are scaled by their largest coefficient and the objective by its own, so that HiGHS's absolute tolerances mean the
same for bytes and for milliseconds. The optimum is proven or the status says that it is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, pairwise

import highspy
import numpy as np

from moesaic.core.errors import StageError
from moesaic.search.library import Choice, Table, total
from moesaic.search.limits import TOLERANCE, LimitSet

_OPTIMAL = highspy.HighsModelStatus.kOptimal
_INFEASIBLE = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)
_TIME = highspy.HighsModelStatus.kTimeLimit


def stopped_clock() -> float:
    """A time that never passes, for solves without a limit on their time."""
    return 0.0


@dataclass(frozen=True)
class Effort:
    """When to stop: at a proven relative gap, after a time, or after so many nodes of branch and bound."""

    time_limit_s: float = 60.0
    relative_gap: float = 1e-6
    most_nodes: int | None = None
    clock: Callable[[], float] = stopped_clock
    """Seconds that pass: what the time limit is measured with."""


@dataclass(frozen=True)
class Outcome:
    """What a solve returned: ``objective >= bound`` always, and ``gap`` is their relative distance."""

    choice: Choice
    objective: float
    status: str
    """``optimal`` if proven within the gap asked for, else ``time_limit``."""
    bound: float
    gap: float
    seconds: float


@dataclass
class _Rows:
    """A sparse matrix under construction, row by row."""

    start: list[int] = field(default_factory=lambda: [0])
    index: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, columns: Sequence[int], values: Sequence[float], lower: float, upper: float) -> None:
        self.index += columns
        self.value += values
        self.start.append(len(self.index))
        self.lower.append(lower)
        self.upper.append(upper)


def branch_and_bound(
    objective: Table,
    limits: LimitSet,
    effort: Effort,
    start: Choice | None = None,
) -> Outcome | None:
    """Solve; None if no choice keeps the limits.

    Args:
        objective: what to minimise, per layer and variant.
        limits: all of them hold at once; none counts groups of layers.
        effort: when to stop.
        start: a choice that keeps the limits, as the first incumbent.

    Raises:
        StageError: if the time ran out before any solution was found.
    """
    columns = _Columns.of(objective, limits)
    cost = np.zeros(columns.size)
    cost[: columns.num_choices] = [value for row in objective for value in row]
    scale = float(np.abs(cost).max()) or 1.0
    solver = _solver(_rows(columns, limits), cost / scale, effort)
    if start is not None:
        solution = highspy.HighsSolution()
        solution.col_value = columns.values(start)
        solver.setSolution(solution)
    solver.run()
    return _read(solver, objective, columns, scale)


@dataclass(frozen=True)
class _Columns:
    """Where the program's variables are."""

    layers: list[range]
    """For every layer those of its variants."""
    windows: tuple[tuple[int | None, ...], ...]
    layouts: dict[int | None, int]
    size: int

    @classmethod
    def of(cls, objective: Table, limits: LimitSet) -> "_Columns":
        ends = list(accumulate(map(len, objective), initial=0))
        layers = [range(first, end) for first, end in pairwise(ends)]
        windows = sorted({window for row in limits.windows for window in row}, key=lambda window: window or 0)
        layouts = dict(zip(windows, count(ends[-1]), strict=False)) if limits.max_layouts else {}
        return cls(layers, limits.windows, layouts, ends[-1] + len(layouts))

    @property
    def num_choices(self) -> int:
        return self.layers[-1].stop

    def using(self, window: int | None) -> list[int]:
        """The variants with this window."""
        rows = zip(self.layers, self.windows, strict=True)
        return [column for layer, row in rows for column, other in zip(layer, row, strict=True) if other == window]

    def values(self, choice: Choice) -> list[float]:
        """A choice as values of all variables."""
        values = [0.0] * self.size
        for layer, index in zip(self.layers, choice, strict=True):
            values[layer[index]] = 1.0
        for row, index in zip(self.windows, choice, strict=True):
            if self.layouts:
                values[self.layouts[row[index]]] = 1.0
        return values


def _rows(columns: _Columns, limits: LimitSet) -> _Rows:
    rows = _Rows()
    for layer in columns.layers:
        rows.add(layer, [1.0] * len(layer), 1.0, 1.0)
    for limit in limits.linear:
        usage = dict(enumerate(value for row in limit.usage for value in row))
        scale = max(map(abs, usage.values())) or 1.0
        room = limit.bound - limit.fixed + TOLERANCE * abs(limit.bound)
        rows.add(list(usage), [value / scale for value in usage.values()], -highspy.kHighsInf, room / scale)
    _add_windows(rows, columns, limits)
    return rows


def _add_windows(rows: _Rows, columns: _Columns, limits: LimitSet) -> None:
    """Which windows are in use."""
    if columns.layouts:
        rows.add(list(columns.layouts.values()), [1.0] * len(columns.layouts), 0.0, limits.max_layouts or 0)
    for window, column in columns.layouts.items():
        for user in columns.using(window):
            rows.add([user, column], [1.0, -1.0], -highspy.kHighsInf, 0.0)


def _solver(rows: _Rows, cost: np.ndarray, effort: Effort) -> highspy.Highs:
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(cost), len(rows.lower)
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, np.zeros(len(cost)), np.ones(len(cost))
    model.row_lower_, model.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_ = np.array(rows.start), np.array(rows.index)
    model.a_matrix_.value_ = np.array(rows.value)
    model.integrality_ = [highspy.HighsVarType.kInteger] * len(cost)
    solver = highspy.Highs()
    options = {
        "output_flag": False,
        "threads": 1,
        "time_limit": effort.time_limit_s,
        "mip_rel_gap": effort.relative_gap,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": 1e-9,
        "primal_feasibility_tolerance": 1e-9,
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    if effort.most_nodes is not None:
        solver.setOptionValue("mip_max_nodes", effort.most_nodes)
    solver.passModel(model)
    return solver


def _read(solver: highspy.Highs, objective: Table, columns: _Columns, scale: float) -> Outcome | None:
    status, info = solver.getModelStatus(), solver.getInfo()
    if status in _INFEASIBLE:
        return None
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise StageError(
            f"HiGHS stopped without a solution (status {solver.modelStatusToString(status)}) after "
            f"{solver.getRunTime():.1f} s; raise time_limit_s or loosen the limits"
        )
    values = np.array(solver.getSolution().col_value)
    choice = tuple(int(values[layer].argmax()) for layer in columns.layers)
    reached = total(objective, choice)
    bound = min(info.mip_dual_bound * scale, reached)
    gap = (reached - bound) / max(abs(reached), 1e-12 * scale)
    name = {_OPTIMAL: "optimal", _TIME: "time_limit"}.get(status, solver.modelStatusToString(status))
    return Outcome(choice, reached, name, bound, gap, solver.getRunTime())

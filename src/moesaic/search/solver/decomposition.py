"""The search's integer program, decomposed before it is branched on (paper B, its MIP, for hundreds of variants).

The program is that of :mod:`moesaic.search.solver.mip`. It is solved in three steps:

1. Relax it. This gives a lower bound, and for every variant a bound on all choices that have it
   (:mod:`moesaic.search.solver.lagrangian`).
2. Improve a choice by local search. This often proves that it is optimal (:mod:`moesaic.search.solver.neighbourhood`).
3. Branch and bound from that choice (:mod:`moesaic.search.solver.mip`). Variants that cannot be in a better choice, or
   that another variant dominates, are left out.

Steps 2 and 3 are repeated with growing effort until one of them has the proof.

Limits that are not sums: with ``max_layouts`` every set of so many windows is relaxed by itself, and the least bound
counts. Where an engine allocates KV memory for groups of layers, each number of layers per window is a program of its
own (``LimitSet.at``); these are solved in the order of their bounds, until no bound is below the best objective. An
earlier solution to differ from is one more limit.

Departure from paper B: it hands the program to a solver as a whole.

Results repeat unless the time limit cuts the third step short; the clock is read for that limit alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, compress
from typing import TypeVar

import numpy as np

from moesaic.search.library import Choice, Table, total
from moesaic.search.limits import TOLERANCE, GroupedCache, Limit, LimitSet
from moesaic.search.solver.lagrangian import ROUNDING, Mask, Program, Relaxation, dense, relax, undominated
from moesaic.search.solver.mip import Effort, Outcome, branch_and_bound
from moesaic.search.solver.neighbourhood import improve_choice

_T = TypeVar("_T")
Relaxed = Sequence[tuple[Program, Relaxation]]
"""Programs with their bounds; a choice that keeps the limits is in one of them."""
Solve = Callable[[Table, LimitSet, Effort, Choice | None], Outcome | None]
"""Solves a program that is all sums, from a first incumbent."""
PAIRS_PER_S = 1e7
"""Pairs that one local search may look at, per second of the time limit: about a twentieth of what one core does."""
ATTEMPTS = ((512, 0), (2048, 100), (4096, None))
"""Effort of each attempt: combinations that local search lists, and nodes of branch and bound (None: no limit).

The first attempt does not branch, because longer lists are often enough for the proof.
"""
MOST_WINDOW_SETS = 64
"""With more sets of ``max_layouts`` windows than this, the relaxation leaves that limit out."""


@dataclass(frozen=True)
class Apart:
    """A solution has at most ``most`` blocks in common with ``choice`` (paper B, diversity)."""

    choice: Choice
    most: int

    def as_limit(self, table: Table) -> Limit:
        """This condition as a linear limit on choices from a table's variants."""
        rows = zip(table, self.choice, strict=True)
        shared = tuple(tuple(float(index == chosen) for index in range(len(row))) for row, chosen in rows)
        return Limit("blocks in common with an earlier solution", "", shared, 0, self.most)


def minimise(
    objective: Table,
    limits: LimitSet,
    effort: Effort,
    start: Choice | None = None,
    apart: Sequence[Apart] = (),
    cache: GroupedCache | None = None,
    solve: Solve | None = None,
) -> Outcome | None:
    """Solve; None if no choice keeps the limits.

    Args:
        objective: what to minimise, per layer and variant.
        limits: all of them hold at once.
        effort: when to stop.
        start: a choice that may be the first incumbent if it keeps the limits.
        apart: earlier solutions to differ from.
        cache: what the objective counts by groups of layers, on top.
        solve: how to solve a program that is all sums; decomposed if None.

    Raises:
        StageError: if the time ran out before any solution was found.
    """
    began = effort.clock()
    limits = replace(limits, linear=(*limits.linear, *(earlier.as_limit(objective) for earlier in apart)))
    start = start if start is not None and limits.holds(start) else None
    solve = solve or _decomposed
    found = (
        _by_layout(objective, limits, effort, start, cache, solve)
        if limits.grouped or cache
        else solve(objective, limits, effort, start)
    )
    if found is None:
        return None
    assert max((limit.excess(found.choice) for limit in limits.linear), default=0) < 1e-6, limits.broken(found.choice)
    return replace(found, seconds=effort.clock() - began)


def _by_layout(
    objective: Table,
    limits: LimitSet,
    effort: Effort,
    start: Choice | None,
    cache: GroupedCache | None,
    solve: Solve,
) -> Outcome | None:
    """Solve for every number of layers per window that may be in a better choice than the best so far."""
    began, best = effort.clock(), None
    programs = []
    for layout in limits.layouts():
        fixed, extra = limits.at(layout), cache.of(layout) if cache else 0.0
        relaxation = relax(next(_programs(objective, fixed)))
        if relaxation is not None:
            programs.append((relaxation.bound + extra, extra, fixed))
    bounds = [math.inf]
    for bound, extra, fixed in sorted(programs, key=lambda program: program[0]):
        if best is not None and best.objective - bound <= effort.relative_gap * abs(best.objective):
            bounds.append(bound)
            break
        left = replace(effort, time_limit_s=max(0.0, effort.time_limit_s - (effort.clock() - began)))
        found = solve(objective, fixed, left, start if start is not None and fixed.holds(start) else None)
        if found is None:
            continue
        bounds.append(found.bound + extra)
        if best is None or found.objective + extra < best.objective:
            best = replace(found, objective=found.objective + extra)
    return best and _outcome(best.choice, best.objective, min(bounds), effort)


def _decomposed(objective: Table, limits: LimitSet, effort: Effort, start: Choice | None) -> Outcome | None:
    """Relax, improve, branch."""
    began = effort.clock()
    bounded = ((program, relax(program)) for program in _programs(objective, limits))
    relaxed = [(program, relaxation) for program, relaxation in bounded if relaxation is not None]
    if not relaxed:
        return None
    best: Outcome | None = None
    for length, nodes in ATTEMPTS:
        best = _improve(objective, limits, effort, best.choice if best else start, relaxed, length)
        if best is None or (best.gap > effort.relative_gap and nodes != 0):
            left = max(0.0, effort.time_limit_s - (effort.clock() - began))
            attempt = replace(effort, time_limit_s=left, most_nodes=nodes if best else None)
            best = _branch(objective, limits, attempt, best, relaxed)
        if best is None or best.gap <= effort.relative_gap:
            break
    return best


def _programs(objective: Table, limits: LimitSet) -> Iterator[Program]:
    """Programs without limits on windows, of which one has all choices that keep those limits, or more."""
    usage = [dense(limit.usage) for limit in limits.linear]
    cost = dense(objective, np.inf)
    shape = (len(usage), *cost.shape)
    whole = Program(cost, np.array(usage).reshape(shape), np.array([_room(limit) for limit in limits.linear]))
    windows = sorted({window for row in limits.windows for window in row}, key=lambda window: window or 0)
    most = limits.max_layouts or len(windows)
    if most >= len(windows) or math.comb(len(windows), most) > MOST_WINDOW_SETS:
        yield whole
        return
    for some in combinations(windows, most):
        yield whole.only(_mask(limits, [some] * len(cost), cost.shape[1]))


def _room(limit: Limit) -> float:
    """What the layers may use; half the tolerance is left to sums of floats."""
    return limit.bound - limit.fixed + 0.5 * TOLERANCE * abs(limit.bound)


def _mask(limits: LimitSet, allowed: Sequence[Sequence[int | None]], width: int) -> Mask:
    """The variants whose window is allowed in their layer."""
    rows = zip(limits.windows, allowed, strict=True)
    return np.array([[*(window in some for window in row), *[False] * (width - len(row))] for row, some in rows])


def _improve(
    objective: Table, limits: LimitSet, effort: Effort, start: Choice | None, relaxed: Relaxed, length: int
) -> Outcome | None:
    """Improve a choice by local search, and bound it; None if no choice is known that keeps the limits."""
    bound = min(relaxation.bound for _, relaxation in relaxed)
    program, relaxation = min(relaxed, key=lambda pair: pair[1].bound)
    result = improve_choice(
        program,
        relaxation,
        start if start is not None and np.isfinite(program.cost_of(start)) else None,
        effort.relative_gap,
        length,
        PAIRS_PER_S * effort.time_limit_s,
    )
    proven = result.proven and len(relaxed) == 1
    if limits.holds(result.choice) and (start is None or total(objective, result.choice) <= total(objective, start)):
        start = result.choice
    if start is None:
        return None
    cost = total(objective, start)
    return _outcome(start, cost, cost if proven else bound, effort)


def _outcome(choice: Choice, cost: float, bound: float, effort: Effort) -> Outcome:
    bound = min(bound, cost)
    gap = (cost - bound) / max(abs(cost), ROUNDING) if cost - bound > ROUNDING * abs(cost) else 0.0
    return Outcome(choice, cost, "optimal" if gap <= effort.relative_gap else "time_limit", bound, gap, 0.0)


def _branch(
    objective: Table, limits: LimitSet, effort: Effort, best: Outcome | None, relaxed: Relaxed
) -> Outcome | None:
    """Branch and bound from the best known choice, over the variants that may be in a better one."""
    kept = _kept(limits, best, relaxed)
    indices = [np.flatnonzero(row).tolist() for row in kept]
    start = None if best is None else tuple(row.index(index) for row, index in zip(indices, best.choice, strict=True))
    outcome = branch_and_bound(_chosen(objective, kept), _restricted(limits, kept), effort, start)
    if outcome is None:
        return best and _outcome(best.choice, best.objective, best.objective, effort)
    choice = tuple(row[index] for row, index in zip(indices, outcome.choice, strict=True))
    if best is not None and best.objective < outcome.objective:
        choice, outcome = best.choice, replace(outcome, objective=best.objective)
    bound = max(outcome.bound, min(relaxation.bound for _, relaxation in relaxed))
    checked = _outcome(choice, outcome.objective, bound, effort)
    return replace(checked, status=outcome.status) if checked.status != "optimal" else checked


def _kept(limits: LimitSet, best: Outcome | None, relaxed: Relaxed) -> Mask:
    """The variants that may be in a choice better than the best known, and that choice's own."""
    program = replace(relaxed[0][0], cost=np.min([program.cost for program, _ in relaxed], axis=0))
    if best is not None:
        forced = np.min([relaxation.forced() for _, relaxation in relaxed], axis=0)
        program = program.only(forced <= best.objective + ROUNDING * abs(best.objective))
    names = sorted({window for row in limits.windows for window in row}, key=lambda window: window or 0)
    alike = limits.max_layouts is None
    groups = dense(
        tuple(tuple(0.0 if alike else float(names.index(window)) for window in row) for row in limits.windows)
    )
    kept = undominated(program, groups.astype(np.int64))
    if best is not None:
        kept[np.arange(len(kept)), list(best.choice)] = True
    return kept


def _chosen(table: Sequence[Sequence[_T]], kept: Mask) -> tuple[tuple[_T, ...], ...]:
    return tuple(tuple(compress(row, mask)) for row, mask in zip(table, kept.tolist(), strict=True))


def _restricted(limits: LimitSet, kept: Mask) -> LimitSet:
    """The limits on the kept variants alone."""
    linear = tuple(replace(limit, usage=_chosen(limit.usage, kept)) for limit in limits.linear)
    return replace(limits, linear=linear, windows=_chosen(limits.windows, kept))

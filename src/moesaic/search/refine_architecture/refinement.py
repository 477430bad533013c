"""Refine the search's choice by measurement: run assemblies whole, learn how damages interact, solve again.

Each round solves the search's own program, under all limits, for the most promising assemblies, given what has been
measured so far. They are measured next. This repeats until the evaluations are spent. The result is the measured
assembly of least damage, so it is never worse than the search's own choice on the tokens measured.

The program is linear, the promise of an assembly is not. So it is solved for what changes in one layer, within a few
layers of the best assembly known, and again around its solution while that is more promising (a trust region).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from moesaic.search.library import Choice
from moesaic.search.limits import Limit
from moesaic.search.refine_architecture.interactions import Evaluation, LearntDamage
from moesaic.search.search_architecture.search import Search
from moesaic.search.solver.decomposition import Apart, minimise

MOST_CHANGED = (2, 6)
"""Layers that one step may change; both are tried."""
MOST_STEPS = 4
"""Steps from the best assembly known to a proposal."""


def propose(search: Search, evaluations: Sequence[Evaluation], count: int) -> list[Choice]:
    """Up to ``count`` assemblies to measure next, fewer if the limits leave no more.

    Two of one call differ in two layers at least, so that each tells something of its own.
    """
    learnt = LearntDamage.of(search.library, evaluations)
    best = min(evaluations, key=lambda evaluation: evaluation.damage).choice
    layers = search.library.num_layers
    measured = [Apart(evaluation.choice, layers - 1) for evaluation in evaluations]
    proposals: list[Choice] = []
    while len(proposals) < count:
        apart = [*measured, *(Apart(choice, layers - 2) for choice in proposals)]
        proposal = _descend(search, learnt, best, apart)
        if proposal is None:
            break
        proposals.append(proposal)
    return proposals


def _descend(search: Search, learnt: LearntDamage, start: Choice, apart: Sequence[Apart]) -> Choice | None:
    """The most promising assembly that steps from ``start`` reach; None if there is no other."""
    best: Choice | None = None
    for _ in range(MOST_STEPS):
        found = _step(search, learnt, best or start, apart)
        if not found or (best is not None and _promise(learnt, found) >= _promise(learnt, best)):
            break
        best = found
    return best


def _step(search: Search, learnt: LearntDamage, centre: Choice, apart: Sequence[Apart]) -> Choice | None:
    """The best assembly near ``centre``, of those that the linear program returns."""
    table = learnt.around(centre)
    outcomes = (
        minimise(table, search.limits.with_limit(_near(search, centre, most)), search.effort, apart=apart)
        for most in MOST_CHANGED
    )
    return min((outcome.choice for outcome in outcomes if outcome), key=partial(_promise, learnt), default=None)


def _promise(learnt: LearntDamage, choice: Choice) -> float:
    return float(learnt.promise(np.array([choice]))[0])


def _near(search: Search, centre: Choice, most: int) -> Limit:
    """At most so many layers differ from ``centre``."""
    layers = search.library.num_layers
    rows = zip(search.library.variants, centre, strict=True)
    kept = tuple(tuple(-float(index == chosen) for index in range(len(options))) for options, chosen in rows)
    return Limit("layers in common with the best assembly", "", kept, 0, -max(0, layers - most))

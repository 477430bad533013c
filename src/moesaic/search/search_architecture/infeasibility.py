"""Why no assembly keeps the limits: the binding limit, and the best that is reachable instead.

First each limit alone. If every one can be kept alone, each in turn is dropped and minimised with the others kept:
those for which that succeeds are binding. If none does, at least two have to be loosened.
"""

from dataclasses import replace

from moesaic.search.limits import Limit, LimitSet
from moesaic.search.solver.decomposition import minimise
from moesaic.search.solver.mip import Effort


def explain_infeasible(limits: LimitSet, effort: Effort) -> str:
    """One sentence that names the binding limits with the best reachable value of each, and what to do."""
    only_layouts, only_sums = replace(limits, linear=()), replace(limits, linear=(), max_layouts=None)
    fewest = _fewest_layouts(only_layouts, effort)
    if fewest is not None and fewest > (limits.max_layouts or fewest):
        return f"{_layouts(limits)} cannot be kept: at least {fewest} are needed; raise max_layouts to {fewest}"
    alone = {limit: _least(limit, only_sums, effort) for limit in limits.linear}
    hopeless = [_best(limit, used) for limit, used in alone.items() if used is not None and limit.excess_of(used)]
    if hopeless:
        return f"no architecture in the search space keeps {'; '.join(hopeless)}. Loosen it or offer smaller variants"
    together = {limit: _least(limit, limits.without(limit.name), effort) for limit in limits.linear}
    reasons = [_best(limit, used) for limit, used in together.items() if used is not None]
    fewest = _fewest_layouts(limits, effort)
    if fewest is not None:
        reasons.append(f"{_layouts(limits)}, the fewest within the others are {fewest}")
    if reasons:
        return "the limits cannot be kept together. Loosen one, the others kept: " + "; ".join(reasons)
    reasons = [_best(limit, used) for limit, used in alone.items() if used is not None]
    return "the limits cannot be kept together, loosening one is not enough. Each on its own: " + "; ".join(reasons)


def _least(limit: Limit, others: LimitSet, effort: Effort) -> float | None:
    """The least use of a limit within the others; None if the others cannot be kept."""
    outcome = minimise(limit.usage, others, effort, cache=limit.cache)
    return None if outcome is None else limit.used(outcome.choice)


def _best(limit: Limit, used: float) -> str:
    return f"{limit.describe()}, the best reachable is {limit.shown(used):.6g} {limit.unit}".rstrip()


def _layouts(limits: LimitSet) -> str:
    return f"distinct windows <= {limits.max_layouts}"


def _fewest_layouts(limits: LimitSet, effort: Effort) -> int | None:
    """The fewest distinct windows within the linear limits; None if there is no limit on them or nothing helps."""
    if limits.max_layouts is None:
        return None
    nothing = tuple((0.0,) * len(row) for row in limits.windows)
    most = len({window for row in limits.windows for window in row})
    tries = (count for count in range(1, most + 1) if minimise(nothing, replace(limits, max_layouts=count), effort))
    return next(tries, None)

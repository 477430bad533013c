"""The search: least total damage under all limits at once (paper B, its MIP and diverse solutions).

    min_x sum_i damage[i, choice_i]    subject to the limits of every named workload

solved by :mod:`moesaic.search.solver.decomposition`. A further solution may share at most ``floor(diversity * layers)``
blocks with each earlier one. The frontier sweeps one limit, the throughput of the first workload (parameters without
workloads), from what the least damage reaches to the most that is reachable, all other limits kept.

Departure from paper B: workloads' limits hold together instead of one batch size after the other. With two variants
per layer and equal savings the program is a mere sort by damage; ``is_sorting`` tells when it happens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moesaic.core.errors import InfeasibleError
from moesaic.costs.block_costs import AssemblyCost
from moesaic.models.architecture import Architecture, ExpertOrder
from moesaic.search.library import BlockLibrary, Choice, Table, total
from moesaic.search.limits import Limit, LimitSet, check_assembly, limits_of, sweep_limit
from moesaic.search.search_architecture.infeasibility import explain_infeasible
from moesaic.search.search_architecture.stage import SearchArchitectureConfig
from moesaic.search.solver.decomposition import Apart, minimise
from moesaic.search.solver.mip import Effort, Outcome, stopped_clock


@dataclass(frozen=True)
class Solution:
    """One assembly with its damage, its cost, and how good it is known to be.

    ``status`` is ``optimal`` or ``time_limit`` from the solver, ``heuristic`` for a baseline that proves nothing,
    ``refined`` for a choice by measurement and ``parent`` for the parent; ``bound`` and ``gap`` are those of what the
    solver minimised, ``objective``.
    """

    choice: Choice
    architecture: Architecture
    damage: float
    """By scores, which are of the search's own order of experts."""
    cost: AssemblyCost
    status: str
    keeps: ExpertOrder = "order"
    """The order of which its layers keep the first experts."""
    breaks: tuple[str, ...] = ()
    """The limits that it exceeds, in words."""
    objective: str | None = None
    bound: float | None = None
    gap: float | None = None
    seconds: float | None = None

    @property
    def assembly(self) -> tuple[Choice, ExpertOrder]:
        """What makes its checkpoint."""
        return self.choice, self.keeps

    @property
    def known_damage(self) -> float | None:
        """Its damage; None if it keeps other experts than those that were scored."""
        return self.damage if self.keeps == "order" else None


@dataclass(frozen=True)
class Search:
    """A library under limits: all that is solved for or compared shares them."""

    library: BlockLibrary
    config: SearchArchitectureConfig
    limits: LimitSet
    clock: Callable[[], float] = stopped_clock
    """Seconds that pass, for the time limit of each solve."""

    @classmethod
    def of(
        cls, library: BlockLibrary, config: SearchArchitectureConfig, clock: Callable[[], float] = stopped_clock
    ) -> "Search":
        """Translate the config's limits; a ConfigError if one names a workload without costs."""
        return cls(library, config, limits_of(library, config), clock)

    @property
    def effort(self) -> Effort:
        """When each solve stops."""
        return Effort(self.config.time_limit_s, self.config.relative_gap, clock=self.clock)

    def minimise(self, objective: Table, limits: LimitSet, start: Choice | None = None) -> Outcome:
        """Solve for any objective; an InfeasibleError explains why there is no solution."""
        outcome = minimise(objective, limits, self.effort, start)
        if outcome is None:
            raise InfeasibleError(explain_infeasible(limits, self.effort))
        return outcome

    def best(self, start: Choice | None = None) -> Solution:
        """The assembly of least damage, from ``start`` as first incumbent if that keeps the limits."""
        return self.solved(self.minimise(self.library.damages, self.limits, start))

    def diverse(self, first: Solution) -> list[Solution]:
        """``first`` and up to ``num_solutions - 1`` more; fewer if no assembly is far enough from those found."""
        solutions = [first]
        while len(solutions) < self.config.num_solutions:
            apart = [Apart(solution.choice, self.most_in_common) for solution in solutions]
            outcome = minimise(self.library.damages, self.limits, self.effort, apart=apart)
            if outcome is None:
                break
            solutions.append(self.solved(outcome))
        return solutions

    @property
    def most_in_common(self) -> int:
        """Blocks that two diverse solutions may share."""
        return math.floor(self.config.diversity * self.library.num_layers)

    def frontier(self) -> tuple[str, list[Solution]]:
        """What was swept, and the assembly of least damage at every value of it, from loose to tight."""
        swept = sweep_limit(self.library)
        others = self.limits.without(swept.name)
        damages = self.library.damages
        loosest, tightest = self.minimise(damages, others), self.minimise(swept.usage, others)
        bounds = _spread(swept, swept.used(loosest.choice), swept.used(tightest.choice), self.config.frontier_points)
        start, points = tightest.choice, {}
        for bound in reversed(bounds):
            outcome = self.minimise(damages, others.with_limit(replace(swept, bound=bound)), start)
            start = outcome.choice
            points[start] = self.solved(outcome, swept=True)
        return swept.name, list(reversed(points.values()))

    def solved(self, outcome: Outcome, objective: str = "damage", swept: bool = False) -> Solution:
        """Cost and check what the solver returned."""
        solution = self.assembled(outcome.choice, outcome.status, swept)
        return replace(solution, objective=objective, bound=outcome.bound, gap=outcome.gap, seconds=outcome.seconds)

    def assembled(self, choice: Choice, status: str = "heuristic", swept: bool = False) -> Solution:
        """Cost an assembly and check it independently; points of the frontier need not keep the ``swept`` limit."""
        architecture = self.library.architecture(choice)
        cost = self.library.costs.evaluate(architecture)
        if status != "parent":
            check_assembly(self.library, _unswept(self.library, self.config) if swept else self.config, choice)
        return Solution(choice, architecture, total(self.library.damages, choice), cost, status)

    @property
    def is_sorting(self) -> bool:
        """Whether the program is a mere sort: two variants per layer that save the same in every layer."""
        if any(len(options) != 2 for options in self.library.variants) or self.limits.max_layouts:
            return False
        if self.limits.grouped:
            return False
        savings = [[abs(first - second) for first, second in limit.usage] for limit in self.limits.linear]
        return all(math.isclose(min(saving), max(saving), rel_tol=1e-9) for saving in savings)


def _unswept(library: BlockLibrary, config: SearchArchitectureConfig) -> SearchArchitectureConfig:
    """The config without the limit that the frontier sweeps."""
    if not library.costs.workloads:
        return config.model_copy(update={"max_parameters": None, "max_parameters_ratio": None})
    name = library.costs.workloads[0].name
    if name not in config.limits:
        return config
    open_ended = config.limits[name].model_copy(update={"throughput_tokens_per_s": None, "throughput_ratio": None})
    return config.model_copy(update={"limits": config.limits | {name: open_ended}})


def _spread(swept: Limit, loose: float, tight: float, num_points: int) -> list[float]:
    """Bounds on usage whose shown values are evenly spaced, from ``loose`` to ``tight``."""
    steps = [step / max(num_points - 1, 1) for step in range(num_points)]
    if swept.tokens is not None:
        return [1 / (1 / loose + (1 / tight - 1 / loose) * step) for step in steps]
    return [loose + (tight - loose) * step for step in steps]

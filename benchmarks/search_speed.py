"""Speed of the architecture search against HiGHS alone and CBC (by PuLP), one core each, with the same time limit.

smooth   like the real problem: variants are expert counts times windows; damage grows with the experts removed and with
         the logarithm of the view cut off, by other factors and exponents in each layer, and has 3 % of noise; what
         variants use of the limits is the same in all layers. The limits are what the best assembly at prices drawn at
         random uses, less half a percent, so all of them bind.
hard     strongly correlated: usage is uniform integers of 100 to 1000 in every layer, damage 1000 - their mean + noise
         of 0 to 19, limits 0.45 of the sum of the layers' smallest and largest.

Every objective is recomputed from the choice, and every choice is checked against the limits. ``seconds`` are wall
seconds around the solver's call, ``cpu_s`` the processor's; on a busy machine only the latter compare. A gap is
(objective - bound) / objective, within which optimality is proven; all solvers stop at 1e-6.

Run: python benchmarks/search_speed.py [--limit-s 20] [--seeds 3] [--record FILE]
"""

import argparse
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pulp

from moesaic.core.errors import StageError
from moesaic.platform.runs.records import describe_hardware, installed_versions
from moesaic.search.library import Choice, total
from moesaic.search.limits import Limit, LimitSet
from moesaic.search.solver.decomposition import minimise
from moesaic.search.solver.mip import Effort, branch_and_bound

SIZES = ((36, 16, 3), (36, 100, 3), (100, 400, 2), (100, 400, 3))
"""Layers, variants of each, limits."""
GAP = 1e-6
Instance = tuple[tuple[tuple[float, ...], ...], LimitSet]


def smooth(num_layers: int, num_variants: int, num_limits: int, seed: int) -> Instance:
    """An instance like the real problem."""
    generator = np.random.default_rng(seed)
    side = round(num_variants**0.5)
    grid = np.meshgrid(np.linspace(1, 1 / 8, side), np.geomspace(1, 1 / 64, side), indexing="ij")
    experts, view = (share.ravel() for share in grid)
    uses = [0.8 * experts + 0.2 * view, 0.2 * experts + 0.8 * view, 0.7 * experts**0.5 + 0.3 * view]
    usage = 100 * np.array(uses[:num_limits]) * generator.uniform(0.98, 1.02, (num_limits, num_variants))
    usage = np.repeat(usage[:, None], num_layers, axis=1)
    size = num_layers, 1
    removed = generator.lognormal(0, 0.7, size) * (1 - experts) ** generator.uniform(1.2, 2.5, size)
    cut = generator.lognormal(-1, 0.7, size) * (-np.log(view) / np.log(64)) ** generator.uniform(0.5, 1.5, size)
    damage = (removed + cut) * generator.uniform(0.97, 1.03, (num_layers, num_variants))
    prices = generator.uniform(0.3, 1, num_limits) * damage.mean() / usage.mean()
    chosen = (damage + np.tensordot(prices, usage, axes=1)).argmin(axis=1)
    return _instance(damage, usage, 0.995 * usage[:, np.arange(num_layers), chosen].sum(axis=1))


def hard(num_layers: int, num_variants: int, num_limits: int, seed: int) -> Instance:
    """A strongly correlated instance."""
    generator = np.random.default_rng(seed)
    usage = generator.integers(100, 1001, (num_limits, num_layers, num_variants)).astype(float)
    damage = 1000 - usage.mean(axis=0) + generator.integers(0, 20, (num_layers, num_variants))
    return _instance(damage, usage, 0.45 * (usage.min(axis=2) + usage.max(axis=2)).sum(axis=1))


def _instance(damage: np.ndarray, usage: np.ndarray, bounds: np.ndarray) -> Instance:
    tables = [tuple(map(tuple, table.tolist())) for table in (damage, *usage)]
    limits = [
        Limit(f"limit {index}", "", table, 0.0, float(bound))
        for index, (table, bound) in enumerate(zip(tables[1:], bounds, strict=True))
    ]
    return tables[0], LimitSet(tuple(limits), tuple((None,) * len(row) for row in tables[0]))


def ours(instance: Instance, limit_s: float) -> tuple[Choice | None, float | None]:
    """The search's choice and bound."""
    outcome = minimise(*instance, Effort(limit_s, GAP))
    return (None, None) if outcome is None else (outcome.choice, outcome.bound)


def highs(instance: Instance, limit_s: float) -> tuple[Choice | None, float | None]:
    """The whole program given to HiGHS as it is."""
    try:
        outcome = branch_and_bound(*instance, Effort(limit_s, GAP))
    except StageError:
        return None, None
    return (None, None) if outcome is None else (outcome.choice, outcome.bound)


def cbc(instance: Instance, limit_s: float) -> tuple[Choice | None, float | None]:
    """The same given to CBC."""
    objective, limits = instance
    layers = range(len(objective))
    program = pulp.LpProblem("search", pulp.LpMinimize)
    chosen = [[pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j in range(len(objective[i]))] for i in layers]
    pairs = [(i, j) for i in layers for j in range(len(objective[i]))]
    program += pulp.LpAffineExpression((chosen[i][j], objective[i][j]) for i, j in pairs)
    for row in chosen:
        program += pulp.LpAffineExpression((variable, 1) for variable in row) == 1
    for limit in limits.linear:
        program += pulp.LpAffineExpression((chosen[i][j], limit.usage[i][j]) for i, j in pairs) <= limit.bound
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, timeLimit=limit_s, gapRel=GAP, logPath=str(log)))
        text = log.read_text()
    values = [[variable.value() or 0.0 for variable in row] for row in chosen]
    choice = tuple(row.index(max(row)) for row in values)
    whole = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    found = re.search(r"Lower bound:\s+(\S+)", text)
    proven = "Result - Optimal solution found" in text and whole
    bound = float(found[1]) if found else total(objective, choice) if proven else None
    return (choice if whole else None), bound


SOLVERS: dict[str, Callable[[Instance, float], tuple[Choice | None, float | None]]] = {
    "ours": ours,
    "highs": highs,
    "cbc": cbc,
}


def measure(limit_s: float, seeds: int) -> Iterator[dict[str, Any]]:
    """One row per instance and solver."""
    for family in (smooth, hard):
        for layers, variants, num_limits in SIZES:
            for seed in range(seeds):
                instance = family(layers, variants, num_limits, seed)
                for name, solve in SOLVERS.items():
                    row = {"family": family.__name__, "size": f"{layers}x{variants}", "limits": num_limits}
                    yield row | {"seed": seed, "solver": name} | _timed(solve, instance, limit_s)


def _timed(
    solve: Callable[[Instance, float], tuple[Choice | None, float | None]], instance: Instance, limit_s: float
) -> dict[str, Any]:
    wall, processor = time.perf_counter(), _cpu_s()
    choice, bound = solve(instance, limit_s)
    times = {"seconds": round(time.perf_counter() - wall, 2), "cpu_s": round(_cpu_s() - processor, 2)}
    if choice is None or instance[1].excess(choice) > 1e-6:
        return times | {"status": "none", "objective": None, "bound": bound, "gap": None}
    objective = total(instance[0], choice)
    gap = None if bound is None else max(0.0, (objective - bound) / objective)
    status = "optimal" if gap is not None and gap <= 1.01 * GAP else "stopped"
    return times | {"status": status, "objective": objective, "bound": bound, "gap": gap}


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Measure, print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit-s", type=float, default=20.0, help="time limit of every solve (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="instances of each kind (%(default)s)")
    parser.add_argument("--record", type=Path, help="write the record to this file")
    given = parser.parse_args()
    command = f"python benchmarks/search_speed.py --limit-s {given.limit_s:g} --seeds {given.seeds}"
    rows = []
    print("family  size     limits seed solver  seconds  cpu_s  status   objective      bound          gap")
    for row in measure(given.limit_s, given.seeds):
        rows.append(row)
        numbers = [f"{row[key]:14.6f}" if row[key] is not None else f"{'-':>14}" for key in ("objective", "bound")]
        gap = f"{row['gap']:.1e}" if row["gap"] is not None else "-"
        head = f"{row['family']:7} {row['size']:8} {row['limits']:6} {row['seed']:4} {row['solver']:7}"
        print(f"{head} {row['seconds']:7.2f} {row['cpu_s']:6.2f}  {row['status']:8}", *numbers, gap, flush=True)
    record = {
        "command": command,
        "date": str(date.today()),
        "hardware": describe_hardware(),
        "load_average": round(os.getloadavg()[1], 1),
        "versions": {name: installed_versions()[name] for name in ("highspy", "moesaic", "numpy", "python")}
        | {"pulp": pulp.__version__},
        "relative_gap": GAP,
        "rows": rows,
    }
    if given.record:
        given.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The constants of a GPU, fitted to measured cost tables by least squares (our method, not the paper's).

The model of ``moesaic.costs.hardware`` is linear in launch times and in reciprocals of rates: with one column per
constant, ``time = sum_c column_c * constant_c``. A column is what the model itself says with that constant at 1 and all
others without cost, so model and fit cannot drift apart. Errors count relative to the measured time::

    min_c  sum_r (sum_c column[r, c] constant[c] / time[r] - 1)^2,     constant >= 0

A constant that comes out negative is dropped (its part then costs nothing) and the rest is solved again.

Departure: a block is timed whole, which tells neither its two launches apart nor reading experts from reading other
weights. Dense matrices and experts so share one bandwidth and one rate, and all launches of a pass are ``dense_us``.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesaic.core.config import CacheDtype
from moesaic.core.errors import ConfigError
from moesaic.costs.block_costs import CostTable, Runtime
from moesaic.costs.hardware import HardwareTable, MoeFit, Target
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Block
from moesaic.models.families.family import ModelShape

LAUNCHES = ("dense_us", "attention_launch_us", "step_us")
RATES = ("tb_per_s", "pflops", "attention_tb_per_s", "prefill_attention_pflops")
CONSTANTS = (*LAUNCHES, *RATES)


@dataclass(frozen=True)
class Fit:
    """Fitted constants by name and what they leave unexplained."""

    constants: Mapping[str, float]
    """Launches in microseconds, rates in the unit of their name; infinite where nothing was left to explain."""
    mean_error: float
    """Mean of |modelled / measured - 1|."""
    num_times: int

    def table(self, like: HardwareTable, name: str, date: str, num_gpus: int, kv_cache: CacheDtype) -> HardwareTable:
        """A table of these constants; memory, limits and links, which these timings do not tell, are ``like``'s."""
        return replace(
            _table(self.constants, like, num_gpus, kv_cache),
            name=name,
            date=date,
            all_reduce_us=like.all_reduce_us,
            all_reduce_gb_per_s=like.all_reduce_gb_per_s,
        )


def fit(costs: Sequence[CostTable], shape: ModelShape, like: HardwareTable) -> Fit:
    """Fit the constants to measured tables of one GPU and one cache type.

    Raises:
        ConfigError: if the tables hold fewer times than there are constants, or a time that is not positive.
    """
    times = list(_times(costs))
    if len(times) < len(CONSTANTS):
        raise ConfigError(f"{len(times)} times cannot fix {len(CONSTANTS)} constants; measure more blocks or workloads")
    columns = np.array([_column(constant, costs, shape, like) for constant in CONSTANTS]).T
    measured = np.array(times)
    if not (measured > 0).all():
        raise ConfigError("the cost tables hold a time that is not positive; measure them again")
    solution = _solve(columns / measured[:, None])
    error = float(np.abs(columns @ solution / measured - 1).mean())
    constants = {
        name: value if name in LAUNCHES else (1 / value if value else math.inf)
        for name, value in zip(CONSTANTS, solution.tolist(), strict=True)
    }
    return Fit(constants, error, len(times))


def _solve(columns: np.ndarray) -> np.ndarray:
    """Non-negative least squares to a right-hand side of ones; columns are scaled, so that units do not matter."""
    scale = np.linalg.norm(columns, axis=0)
    active = scale > 0
    coefficients = np.zeros(columns.shape[1])
    while active.any():
        scaled = columns[:, active] / scale[active]
        solution = np.linalg.lstsq(scaled, np.ones(len(columns)), rcond=None)[0]
        if (solution >= 0).all():
            coefficients[active] = solution / scale[active]
            break
        active[np.flatnonzero(active)[solution.argmin()]] = False
    return coefficients


def _column(constant: str, costs: Sequence[CostTable], shape: ModelShape, like: HardwareTable) -> list[float]:
    """What the model says of every time with one constant at 1 and no cost for anything else."""
    free = {name: 0.0 if name in LAUNCHES else math.inf for name in CONSTANTS}
    column: list[float] = []
    for table in costs:
        num_gpus = int(table.hardware.get("num_gpus", 1))
        alone = _table(free | {constant: 1.0}, like, num_gpus, table.kv_cache)
        target = Target(alone, shape, num_gpus, table.kv_cache)
        for _, runtime in _runtimes(table, target):
            column += [runtime.prefill_ms, runtime.decode_ms]
    return column


def _times(costs: Iterable[CostTable]) -> Iterator[float]:
    for table in costs:
        for measured, _ in _runtimes(table, None):
            yield from (measured.prefill_ms, measured.decode_ms)


def _runtimes(table: CostTable, target: Target | None) -> Iterator[tuple[Runtime, Runtime]]:
    """Every measured runtime with the modelled one, in one order for all columns; without a target with itself."""
    cases: list[tuple[Block | None, Workload, Runtime]] = []
    for workload in table.workloads:
        cases.append((None, workload, table.fixed.workloads[workload.name]))
        cases += [(block, workload, cost.workloads[workload.name]) for block, cost in table.blocks.items()]
    for block, workload, measured in cases:
        if target is None:
            yield measured, measured
        elif block is None:
            yield measured, target.fixed_runtime(workload)
        else:
            yield measured, target.block_runtime(block, workload)


def _table(constants: Mapping[str, float], like: HardwareTable, num_gpus: int, kv_cache: CacheDtype) -> HardwareTable:
    return replace(
        like,
        moe={num_gpus: MoeFit(0.0, constants["tb_per_s"], constants["pflops"])},
        attention_launch_us=constants["attention_launch_us"],
        attention_floor_us=0.0,
        attention_tb_per_s={kv_cache: constants["attention_tb_per_s"]},
        all_reduce_us=0.0,
        all_reduce_gb_per_s=math.inf,
        dense_us=constants["dense_us"],
        stream_tb_per_s=constants["tb_per_s"],
        dense_pflops=constants["pflops"],
        prefill_attention_pflops=constants["prefill_attention_pflops"],
        step_us=constants["step_us"],
    )

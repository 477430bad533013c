"""The bound, the neighbourhoods and their proofs against every choice of small programs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.search.library import Choice, total
from moesaic.search.limits import GroupedCache, Limit, LimitSet
from moesaic.search.solver import decomposition, neighbourhood
from moesaic.search.solver.decomposition import Apart, minimise
from moesaic.search.solver.lagrangian import Program, dense, relax, undominated
from moesaic.search.solver.mip import Effort, branch_and_bound
from moesaic.search.solver.neighbourhood import Neighbourhoods, improve_choice

EXACT = Effort(relative_gap=0.0)


def random_program(seed: int, num_layers: int = 5, num_variants: int = 4, num_limits: int = 2) -> Program:
    generator = np.random.default_rng(seed)
    usage = generator.integers(0, 30, (num_limits, num_layers, num_variants)).astype(float)
    saved = usage.sum(axis=0) / max(num_limits, 1)
    cost = np.round(40 - saved + generator.uniform(0, 12, (num_layers, num_variants)), 3)
    missing = generator.random((num_layers, num_variants)) < 0.2
    missing[:, 0] = False
    room = np.round(generator.uniform(0.25, 0.7) * usage.max(axis=2).sum(axis=1))
    return Program(np.where(missing, np.inf, cost), usage, room)


def every_choice(program: Program) -> list[Choice]:
    return list(product(*(np.flatnonzero(np.isfinite(row)).tolist() for row in program.cost)))


def optimum(program: Program) -> float | None:
    return min((program.cost_of(choice) for choice in every_choice(program) if program.holds(choice)), default=None)


def as_tables(program: Program) -> tuple[tuple[tuple[float, ...], ...], LimitSet]:
    """The program as the search states it; variants have one of two windows, alternately."""
    present = np.isfinite(program.cost)
    tables = [
        tuple(tuple(row[kept].tolist()) for row, kept in zip(table, present, strict=True))
        for table in (program.cost, *program.usage)
    ]
    limits = [
        Limit(f"limit {index}", "", table, 0.0, float(room))
        for index, (table, room) in enumerate(zip(tables[1:], program.room, strict=True))
    ]
    windows = tuple(tuple(8 if index % 2 else None for index in range(len(row))) for row in tables[0])
    return tables[0], LimitSet(tuple(limits), windows)


def test_a_bound_by_hand() -> None:
    """Two layers may pay 2 to use nothing instead of 4; room for 4 of 8: at a price of 1/2 every choice pays 2."""
    program = Program(np.array([[0.0, 2.0], [0.0, 2.0]]), np.array([[[4.0, 0.0], [4.0, 0.0]]]), np.array([4.0]))
    relaxation = relax(program)
    assert relaxation is not None
    assert relaxation.prices == pytest.approx([0.5])
    assert relaxation.bound == pytest.approx(2.0)
    assert relaxation.forced() == pytest.approx(np.full((2, 2), 2.0))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), num_limits=st.integers(0, 3))
def test_the_bound_is_below_and_the_found_above_every_optimum(seed: int, num_limits: int) -> None:
    program = random_program(seed, num_limits=num_limits)
    best, relaxation = optimum(program), relax(program)
    if relaxation is None:
        assert best is None
        return
    result = improve_choice(program, relaxation, None, 0.0, 512, 1e6)
    cost, slack = program.cost_of(result.choice), program.room - program.used(result.choice)
    paid = relaxation.reduced[np.arange(program.num_layers), list(result.choice)].sum() + relaxation.prices @ slack
    assert cost == pytest.approx(relaxation.bound + paid), "what every choice pays exactly"
    if best is not None:
        assert relaxation.bound <= best + 1e-9
        forced = relaxation.forced()
        for choice in filter(program.holds, every_choice(program)):
            assert program.cost_of(choice) >= max(forced[layer, index] for layer, index in enumerate(choice)) - 1e-9
    if program.holds(result.choice):
        assert best is not None and cost >= best - 1e-9
        if result.proven:
            assert cost == pytest.approx(best)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), most_layouts=st.none() | st.just(1), grouped=st.booleans(), work=st.booleans())
def test_the_solution_equals_brute_force(seed: int, most_layouts: int | None, grouped: bool, work: bool) -> None:
    """With and without the neighbourhoods, whose work is counted per second of the time limit."""
    objective, limits = as_tables(random_program(seed, num_layers=4))
    if grouped:
        cache = GroupedCache("vllm", limits.windows, {None: 2.5, 8: 1.0})
        limits = replace(limits, linear=(replace(limits.linear[0], cache=cache), *limits.linear[1:]))
    limits = replace(limits, max_layouts=most_layouts)
    choices = filter(limits.holds, product(*(range(len(row)) for row in objective)))
    best = min((total(objective, choice) for choice in choices), default=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decomposition, "PAIRS_PER_S", decomposition.PAIRS_PER_S if work else 0)
        outcome = minimise(objective, limits, EXACT)
    if best is None:
        assert outcome is None
    else:
        assert outcome is not None and outcome.status == "optimal"
        assert limits.holds(outcome.choice) and outcome.objective == pytest.approx(best)
        assert outcome.bound <= outcome.objective and outcome.gap <= 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_decomposed_and_whole_agree(seed: int) -> None:
    objective, limits = as_tables(random_program(seed, num_layers=12, num_variants=8, num_limits=3))
    mine, whole = minimise(objective, limits, EXACT), branch_and_bound(objective, limits, EXACT)
    assert (mine is None) == (whole is None)
    if mine is not None and whole is not None:
        assert mine.objective == pytest.approx(whole.objective) and mine.status == whole.status == "optimal"


def test_results_repeat() -> None:
    instance = as_tables(random_program(3, num_layers=12, num_variants=8))
    first, second = (minimise(*instance, Effort()) for _ in range(2))
    assert first is not None and second is not None and first.choice == second.choice and first.bound == second.bound


def test_a_neighbourhood_changes_its_own_layers_alone_and_never_for_the_worse() -> None:
    program = random_program(1, num_layers=8, num_variants=6)
    relaxation = relax(program)
    assert relaxation is not None
    start = tuple(int(index) for index in np.where(np.isfinite(program.cost), program.usage.sum(axis=0), 99).argmin(1))
    assert program.holds(start)
    near = Neighbourhoods(program, relaxation, start)
    near.improve([0, 3, 5], 1000)
    changed = [layer for layer, index in enumerate(near.choice) if index != start[layer]]
    assert set(changed) <= {0, 3, 5} and changed
    offers = product(*(np.flatnonzero(np.isfinite(program.cost[layer])) for layer in (0, 3, 5)))
    others = [(a, *start[1:3], b, start[4], c, *start[6:]) for a, b, c in offers]
    best = min(program.cost_of(choice) for choice in others if program.holds(choice))
    assert program.cost_of(tuple(near.choice)) == pytest.approx(best)


def test_a_proof_needs_whole_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    program = random_program(1, num_layers=8, num_variants=6)
    relaxation = relax(program)
    assert relaxation is not None
    assert improve_choice(program, relaxation, None, 0.0, 512, 1e9).proven
    monkeypatch.setattr(neighbourhood, "PROOF_SHARE", 0)
    assert not improve_choice(program, relaxation, None, 0.0, 512, 1e9).proven


def test_dominated_variants_go() -> None:
    """The second variant is worse than the first, the third cheaper, the fourth the first again, the fifth missing."""
    cost = np.array([[2.0, 3.0, 1.0, 2.0, np.inf]])
    program = Program(cost, np.array([[[5.0, 5.0, 6.0, 5.0, 0.0]]]), np.array([9.0]))
    one_group, two = np.zeros((1, 5), dtype=np.int64), np.array([[0, 0, 0, 1, 0]])
    assert undominated(program, one_group).tolist() == [[True, False, True, False, False]]
    assert undominated(program, two).tolist() == [[True, False, True, True, False]]


def test_a_solution_apart_from_another() -> None:
    objective, limits = as_tables(random_program(5, num_layers=5))
    first = minimise(objective, limits, EXACT)
    assert first is not None
    second = minimise(objective, limits, EXACT, apart=[Apart(first.choice, 2)])
    assert second is not None
    assert sum(a == b for a, b in zip(first.choice, second.choice, strict=True)) <= 2
    others = [
        total(objective, choice)
        for choice in filter(limits.holds, product(*(range(len(row)) for row in objective)))
        if sum(a == b for a, b in zip(first.choice, choice, strict=True)) <= 2
    ]
    assert second.objective == pytest.approx(min(others))


def test_a_start_that_breaks_the_limits_is_not_used() -> None:
    objective, limits = as_tables(random_program(5, num_layers=5))
    outcome, expected = minimise(objective, limits, EXACT, start=(0,) * 5), minimise(objective, limits, EXACT)
    assert not limits.holds((0,) * 5) or outcome is not None
    assert outcome is not None and expected is not None and outcome.objective == pytest.approx(expected.objective)


def test_tables_of_unequal_rows_become_arrays() -> None:
    assert dense(((1.0, 2.0), (3.0,)), np.inf).tolist() == [[1.0, 2.0], [3.0, np.inf]]


@pytest.mark.parametrize("correlated", [False, True])
def test_many_variants_are_bounded_in_little_work(correlated: bool) -> None:
    """60 layers of 100 variants: a choice within a thousandth of the bound, whether or not it is proven."""
    generator = np.random.default_rng(0)
    usage = generator.integers(100, 1001, (2, 60, 100)).astype(float)
    spread = generator.integers(0, 20, (60, 100)) if correlated else generator.uniform(0, 900, (60, 100))
    program = Program(1000 - usage.mean(axis=0) + spread, usage, 0.45 * (usage.min(axis=2) + usage.max(axis=2)).sum(1))
    relaxation = relax(program)
    assert relaxation is not None
    result = improve_choice(program, relaxation, None, 1e-6, 512, 2e7)
    assert program.holds(result.choice)
    cost = program.cost_of(result.choice)
    assert relaxation.bound <= cost <= relaxation.bound * (1 + 1e-3)

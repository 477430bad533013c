"""The search against brute force over every assembly of small libraries."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ArtifactError, ConfigError, InfeasibleError
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.models.architecture import AXES, Architecture, Block
from moesaic.search import limits as limits_module
from moesaic.search.library import BlockLibrary, Choice, distinct_blocks, total, variants_of
from moesaic.search.search_architecture.baselines import _Excesses
from moesaic.search.search_architecture.search import Search
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.solver.decomposition import minimise
from moesaic.search.solver.mip import Effort
from moesaic.search.space import SearchSpace
from tests.search.small_library import brute_force, every_choice, keeps, make_library

configs = st.builds(
    SearchArchitectureConfig,
    limits=st.fixed_dictionaries(
        {},
        optional={
            "long": st.builds(
                Limits,
                memory_ratio=st.none() | st.floats(0.4, 1.0),
                throughput_ratio=st.none() | st.floats(1.0, 2.0),
                latency_ratio=st.none() | st.floats(0.4, 1.0),
            ),
            "short": st.builds(Limits, throughput_ratio=st.none() | st.floats(1.0, 2.0)),
        },
    ),
    max_parameters_ratio=st.none() | st.floats(0.5, 1.0),
    max_experts_ratio=st.none() | st.floats(0.5, 1.0),
    max_layouts=st.none() | st.integers(2, 4),
    min_windowed_share=st.floats(0, 1),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    config=configs,
    seed=st.integers(0, 1000),
    engine=st.sampled_from(["moesaic", "vllm", "vllm_puzzle"]),
    used=st.sampled_from([(2,), (2, 1)]),
)
def test_the_search_equals_brute_force(
    config: SearchArchitectureConfig, seed: int, engine: TargetEngine, used: tuple[int, ...]
) -> None:
    library = make_library(seed, engine=engine, used=used)
    expected = brute_force(library, config)
    search = Search.of(library, config)
    if expected is None:
        with pytest.raises(InfeasibleError):
            search.best()
    else:
        best = search.best()
        assert best.damage == pytest.approx(expected, rel=1e-5)
        assert keeps(library, config, best.choice)
        assert best.status == "optimal"
        assert best.bound is not None and best.gap is not None
        assert best.bound <= best.damage and best.gap <= 1e-6


def test_memory_pays_for_unfilled_groups() -> None:
    """Of 5 full layers two are turned: groups of 2 make 4 of the 3 left, and 6 of the 5 that are windows of 4."""
    exact, grouped = make_library(1, num_layers=10), make_library(1, num_layers=10, engine="vllm")
    turned = exact.parent.replace(1, Block(8, 2, 64, 16)).replace(3, Block(8, 2, 64, 16))
    spared = exact.costs.evaluate(turned).memory_mib["long"]
    assert grouped.costs.evaluate(turned).memory_mib["long"] > spared
    config = SearchArchitectureConfig(limits={"long": Limits(memory_mib=spared)})
    free, paying = Search.of(exact, config).best(), Search.of(grouped, config).best()
    assert paying.damage > free.damage
    assert free.cost.memory_mib["long"] <= spared and paying.cost.memory_mib["long"] <= spared


@pytest.mark.parametrize("seed", range(3))
def test_greedy_weighs_groups_as_they_are(seed: int) -> None:
    """Its table of moves against each moved assembly by itself."""
    library = make_library(seed, engine="vllm")
    limits = Search.of(library, SearchArchitectureConfig(limits={"long": Limits(memory_ratio=0.6)})).limits
    choice = library.parent_choice
    table = _Excesses.of(limits).after(np.array(choice))
    for layer, options in enumerate(library.variants):
        for index in range(len(options)):
            moved = (*choice[:layer], index, *choice[layer + 1 :])
            assert table[layer, index] == pytest.approx(limits.excess(moved), abs=1e-12)


def test_limits_may_be_absolute() -> None:
    library = make_library(1)
    parent = library.costs.evaluate(library.parent)
    ratios = SearchArchitectureConfig(
        limits={"long": Limits(memory_ratio=0.7, throughput_ratio=1.4, latency_ratio=0.8)}, max_parameters_ratio=0.8
    )
    absolute = SearchArchitectureConfig(
        limits={
            "long": Limits(
                memory_mib=0.7 * parent.memory_mib["long"],
                throughput_tokens_per_s=1.4 * parent.throughput_tokens_per_s["long"],
                latency_ms=0.8 * parent.latency_ms["long"],
            )
        },
        max_parameters=int(0.8 * parent.parameters),
    )
    assert Search.of(library, ratios).best().choice == Search.of(library, absolute).best().choice


def test_without_limits_the_parent_is_best() -> None:
    library = make_library(2)
    best = Search.of(library, SearchArchitectureConfig()).best()
    assert best.architecture == library.parent
    assert best.damage == best.bound == best.gap == 0


@pytest.mark.parametrize("max_layouts", [None, 2])
def test_a_warm_start_finds_the_same_optimum(max_layouts: int | None) -> None:
    library = make_library(5, num_layers=8, counts=(8, 6, 4, 2))
    config = SearchArchitectureConfig(max_experts_ratio=0.6, max_layouts=max_layouts, min_windowed_share=1)
    search = Search.of(library, config)
    expected = search.best()
    narrowest = Architecture.of(Block(2, 2, 64, block.window or 8) for block in library.parent.blocks)
    start = library.choice(narrowest)
    assert search.limits.holds(start)
    warm = search.best(start)
    assert warm.damage == pytest.approx(expected.damage, rel=1e-6)
    assert len(warm.architecture.layouts) <= (max_layouts or 4)


def test_two_options_and_equal_savings_are_a_sort() -> None:
    library = make_library(3, num_layers=8)
    layers = range(library.num_layers)
    damages = {
        (layer, block): library.damages[layer][library.variants[layer].index(block)]
        for layer in layers
        for block in (library.parent.blocks[layer], Block(4, 2, 64, library.parent.blocks[layer].window))
    }
    two = BlockLibrary.of(library.parent, damages, library.costs)
    search = Search.of(two, SearchArchitectureConfig(max_experts_ratio=0.75))
    assert search.is_sorting
    assert not Search.of(library, SearchArchitectureConfig(max_experts_ratio=0.75)).is_sorting
    cheapest = sorted(layers, key=lambda layer: damages[layer, Block(4, 2, 64, two.parent.blocks[layer].window)])[:4]
    halved = [layer for layer, block in enumerate(search.best().architecture.blocks) if block.num_experts == 4]
    assert halved == sorted(cheapest)


def test_diverse_solutions_differ_enough_and_are_each_the_best_left() -> None:
    library = make_library(7)
    config = SearchArchitectureConfig(max_experts_ratio=0.8, diversity=0.5, num_solutions=3)
    search = Search.of(library, config)
    found = search.diverse(search.best())
    assert len(found) == 3
    left = [choice for choice in every_choice(library) if keeps(library, config, choice)]
    for solution in found:
        best = min(total(library.damages, choice) for choice in left)
        assert solution.damage == pytest.approx(best, rel=1e-5)
        left = [
            choice
            for choice in left
            if sum(mine == other for mine, other in zip(choice, solution.choice, strict=True)) <= 2
        ]


def test_diversity_ends_where_no_assembly_is_left() -> None:
    library = make_library(7)
    search = Search.of(library, SearchArchitectureConfig(diversity=0.1, num_solutions=50))
    assert 1 < len(search.diverse(search.best())) < 50


@pytest.mark.parametrize("seed", range(3))
def test_every_frontier_point_is_optimal_for_its_speed(seed: int) -> None:
    library = make_library(seed)
    config = SearchArchitectureConfig(max_experts_ratio=0.9, frontier_points=6)
    swept, points = Search.of(library, config).frontier()
    assert swept == "throughput of long"
    speeds = [point.cost.throughput_tokens_per_s["long"] for point in points]
    damages = [point.damage for point in points]
    assert len(points) > 2
    assert speeds == sorted(speeds) and damages == sorted(damages)
    feasible = [choice for choice in every_choice(library) if keeps(library, config, choice)]
    for speed, damage in zip(speeds, damages, strict=True):
        as_fast = [choice for choice in feasible if _speed(library, choice) >= speed * (1 - 1e-9)]
        assert damage == pytest.approx(min(total(library.damages, choice) for choice in as_fast), rel=1e-5)
    assert speeds[-1] == pytest.approx(max(_speed(library, choice) for choice in feasible))


def _speed(library: BlockLibrary, choice: Choice) -> float:
    return library.costs.evaluate(library.architecture(choice)).throughput_tokens_per_s["long"]


def test_the_frontier_reaches_past_the_limit_it_sweeps() -> None:
    library = make_library(4)
    config = SearchArchitectureConfig(limits={"long": Limits(throughput_ratio=1.4)}, frontier_points=5)
    _, points = Search.of(library, config).frontier()
    assert points[0].architecture == library.parent


def test_without_workloads_the_frontier_sweeps_parameters() -> None:
    library = make_library(4)
    bare = replace(library, costs=replace(library.costs, workloads=()))
    swept, points = Search.of(bare, SearchArchitectureConfig(frontier_points=4)).frontier()
    assert swept == "parameters"
    assert [point.cost.parameters for point in points] == sorted((p.cost.parameters for p in points), reverse=True)
    assert points[-1].cost.num_experts == 16


def test_an_unreachable_limit_is_named_with_the_best_value() -> None:
    library = make_library(1)
    config = SearchArchitectureConfig(max_experts_ratio=0.3, limits={"long": Limits(memory_ratio=0.9)})
    with pytest.raises(InfeasibleError, match=r"experts <= 9, the best reachable is 16"):
        Search.of(library, config).best()


def test_throughput_is_named_in_tokens_per_second() -> None:
    library = make_library(1)
    fastest = max(_speed(library, choice) for choice in every_choice(library))
    config = SearchArchitectureConfig(limits={"long": Limits(throughput_tokens_per_s=1e6)})
    with pytest.raises(InfeasibleError) as raised:
        Search.of(library, config).best()
    assert f"throughput of long >= 1e+06 tokens/s, the best reachable is {fastest:.6g} tokens/s" in str(raised.value)


def test_too_few_layouts_are_named() -> None:
    search = Search.of(make_library(1), SearchArchitectureConfig(max_layouts=1))
    with pytest.raises(InfeasibleError, match="distinct windows <= 1 cannot be kept: at least 2 are needed"):
        search.best()


def test_limits_that_exclude_each_other_are_all_named() -> None:
    """Layer 1 may become a window of 16, layer 3 one of 8: turning both takes three layouts with the window of 4."""
    library = make_library(1)
    offered = {1: (None, 16), 3: (None, 8)}
    damages = {
        (layer, block): 0.0
        for layer, options in enumerate(library.variants)
        for block in options
        if block.window in offered.get(layer, (4,))
    }
    narrow = BlockLibrary.of(library.parent, damages, library.costs)
    search = Search.of(narrow, SearchArchitectureConfig(max_layouts=2, min_windowed_share=1))
    with pytest.raises(InfeasibleError) as raised:
        search.best()
    assert "full layers turned into windows >= 2, the best reachable is 0" in str(raised.value)
    assert "distinct windows <= 2, the fewest within the others are 3" in str(raised.value)


def test_a_limit_on_an_unknown_workload_is_refused() -> None:
    config = SearchArchitectureConfig(limits={"medium": Limits(memory_ratio=0.5)})
    with pytest.raises(ConfigError, match=r"'medium', which was not costed; the cost table has \['long', 'short'\]"):
        Search.of(make_library(0), config)


def test_a_wrong_solution_does_not_pass_the_check() -> None:
    library = make_library(0)
    config = SearchArchitectureConfig(limits={"long": Limits(throughput_ratio=1.2)})
    with pytest.raises(AssertionError, match="required throughput of long"):
        limits_module.check_assembly(library, config, library.parent_choice)


def test_a_stopped_solve_reports_its_bound() -> None:
    library = make_library(0, num_layers=60, counts=(64, 60, 56, 48, 44, 40, 36, 32, 24, 16))
    config = SearchArchitectureConfig(limits={"long": Limits(throughput_ratio=1.37, memory_ratio=0.7)})
    search = Search.of(library, config)
    start = library.choice(Architecture.of(Block(16, 2, 64, block.window or 8) for block in library.parent.blocks))
    outcome = minimise(library.damages, search.limits, Effort(time_limit_s=0.0), start)
    assert outcome is not None
    assert outcome.status == "time_limit"
    assert outcome.bound <= outcome.objective and outcome.gap > 1e-6


def test_the_variants_of_a_block() -> None:
    space = SearchSpace(expert_counts=(4, 6), windows=(16, 32))
    full = variants_of(Block(8, 2, 64), space)
    assert full[0] == Block(8, 2, 64)
    assert set(full) == {Block(count, 2, 64, window) for count in (8, 6, 4) for window in (None, 32, 16)}
    assert variants_of(Block(8, 2, 64, 4), space) == (Block(8, 2, 64, 4), Block(6, 2, 64, 4), Block(4, 2, 64, 4))
    fewer = variants_of(Block(8, 2, 64, 4), SearchSpace(expert_counts=(4,), experts_per_token=(4, 2, 1), windows=(2,)))
    assert fewer == (Block(8, 2, 64, 4), Block(8, 1, 64, 4), Block(4, 2, 64, 4), Block(4, 1, 64, 4))
    narrower = variants_of(Block(8, 2, 64, 4), SearchSpace(expert_counts=(4,), expert_widths=(96, 64, 32)))
    assert narrower == (Block(8, 2, 64, 4), Block(8, 2, 32, 4), Block(4, 2, 64, 4), Block(4, 2, 32, 4))
    assert len(distinct_blocks(Architecture.of([Block(8, 2, 64, 4), Block(8, 2, 64), Block(8, 2, 64, 4)]), space)) == 12


def test_every_axis_is_on_offer() -> None:
    assert set(SearchSpace(expert_counts=(4,)).offers(Block(8, 2, 64))) == set(AXES)


def test_fewer_experts_than_a_token_uses_are_refused() -> None:
    with pytest.raises(ConfigError, match="expert count 1 is below the 2"):
        variants_of(Block(8, 2, 64), SearchSpace(expert_counts=(4, 1)))


def test_scores_without_costs_or_without_the_parent_are_refused() -> None:
    library = make_library(0)
    damages = {
        (layer, block): damage
        for layer, (options, row) in enumerate(zip(library.variants, library.damages, strict=True))
        for block, damage in zip(options, row, strict=True)
    }
    with pytest.raises(ArtifactError, match="layer 0: block 3e/top-2/64w/4 is scored but not in the cost table"):
        BlockLibrary.of(library.parent, damages | {(0, Block(3, 2, 64, 4)): 0.1}, library.costs)
    with pytest.raises(ArtifactError, match="no row for layer 1 as it is in the parent, 8e/top-2/64w/full"):
        without = {key: damage for key, damage in damages.items() if key != (1, Block(8, 2, 64))}
        BlockLibrary.of(library.parent, without, library.costs)
    with pytest.raises(ArtifactError, match="layer 0: 8e/top-2/64w/full cannot be cut out"):
        BlockLibrary.of(library.parent, damages | {(0, Block(8, 2, 64)): 0.1}, library.costs)
    with pytest.raises(ArtifactError, match="different parents"):
        BlockLibrary.of(Architecture.of(library.parent.blocks[:3]), damages, library.costs)


def test_a_parent_that_expert_parallelism_cannot_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="parent's 6 experts cannot be spread over expert_parallel_size 4"):
        variants_of(Block(6, 2, 64), SearchSpace(expert_counts=(4,), expert_parallel_size=4))

"""Baselines keep the same limits as the search and never beat it."""

from dataclasses import replace

import pytest

from moesaic.core.errors import InfeasibleError
from moesaic.models.architecture import Architecture, Block
from moesaic.search.library import BlockLibrary
from moesaic.search.search_architecture.baselines import baselines, choose_greedily, choose_uniformly, shrink_randomly
from moesaic.search.search_architecture.search import Search
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from tests.search.small_library import every_choice, keeps, make_library

CONFIG = SearchArchitectureConfig(
    limits={"long": Limits(throughput_ratio=1.3, memory_ratio=0.8), "short": Limits(throughput_ratio=1.2)},
    max_experts_ratio=0.75,
    min_windowed_share=0.3,
)


@pytest.mark.parametrize("seed", range(8))
def test_no_baseline_beats_the_search(seed: int) -> None:
    library = make_library(seed, num_layers=6, counts=(8, 6, 4, 2))
    search = Search.of(library, CONFIG)
    best = search.best()
    found = {name: find() for name, find in baselines(search).items()}
    assert set(found) == {"greedy", "uniform", "max_parameters", "random-0", "random-1", "random-2"}
    for name, solution in found.items():
        assert keeps(library, CONFIG, solution.choice), name
        assert solution.damage >= best.damage * (1 - 1e-6), name


def test_greedy_takes_the_least_damage_per_saving() -> None:
    """Layer 0 saves 4 experts for 1.0, layer 1 saves 2 for 0.3: per expert 0.25 against 0.15."""
    library = _two_layers({Block(8): (0.0, 0.0), Block(6): (9.0, 0.3), Block(4): (1.0, 9.0)})
    search = Search.of(library, SearchArchitectureConfig(max_experts_ratio=14 / 16))
    assert library.architecture(choose_greedily(search)).blocks == (Block(8), Block(6))
    tighter = Search.of(library, SearchArchitectureConfig(max_experts_ratio=12 / 16))
    assert library.architecture(choose_greedily(tighter)).blocks == (Block(4), Block(6))
    assert tighter.best().architecture.blocks == (Block(4), Block(8)), "where greedy loses: it cannot take back"


def test_greedy_says_where_it_is_stuck() -> None:
    library = make_library(0)
    search = Search.of(library, SearchArchitectureConfig(max_experts_ratio=0.4))
    with pytest.raises(InfeasibleError, match=r"greedy: no replacement .* experts <= 12 \(it has 16\)"):
        choose_greedily(search)


def test_uniform_is_the_best_of_its_kind() -> None:
    library = make_library(6, num_layers=8, counts=(8, 4))
    config = SearchArchitectureConfig(max_experts_ratio=0.9, min_windowed_share=0.5)
    blocks = library.architecture(choose_uniformly(Search.of(library, config))).blocks
    assert {block.num_experts for block in blocks} == {4}
    assert len({block.window for block in blocks[1::2] if block.window}) == 1
    windowed = [index for index, block in enumerate(blocks[1::2]) if block.window]
    assert windowed in ([0, 2], [1, 3], [0, 1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [1, 2, 3])


def test_uniform_that_cannot_keep_the_limits_says_so() -> None:
    library = make_library(0)
    narrow = SearchArchitectureConfig(max_experts_ratio=0.4)
    with pytest.raises(InfeasibleError, match="uniform: no single expert count"):
        choose_uniformly(Search.of(library, narrow))


def test_random_repeats_for_a_seed_and_stops_just_inside() -> None:
    library = make_library(0, num_layers=6, counts=(8, 6, 4, 2))
    search = Search.of(library, SearchArchitectureConfig(max_experts_ratio=0.7))
    assert shrink_randomly(search, 3) == shrink_randomly(search, 3)
    assert len({shrink_randomly(search, seed) for seed in range(5)}) > 1
    experts = library.architecture(shrink_randomly(search, 3)).num_experts
    assert 33 - 2 < experts <= 33, "the last step took one notch of two experts"


def test_random_that_runs_out_of_steps_says_so() -> None:
    search = Search.of(make_library(0), SearchArchitectureConfig(max_experts_ratio=0.4))
    with pytest.raises(InfeasibleError, match="random-4: every layer is as small as it gets"):
        shrink_randomly(search, 4)


def test_max_parameters_keeps_the_most() -> None:
    library = make_library(2)
    config = SearchArchitectureConfig(limits={"long": Limits(throughput_ratio=1.5)})
    solution = baselines(Search.of(library, config))["max_parameters"]()
    feasible = [choice for choice in every_choice(library) if keeps(library, config, choice)]
    most = max(library.costs.evaluate(library.architecture(choice)).parameters for choice in feasible)
    assert solution.cost.parameters == most
    assert solution.objective == "-parameters" and solution.status == "optimal"


def _two_layers(damages: dict[Block, tuple[float, float]]) -> BlockLibrary:
    costs = make_library(0, counts=(8, 6, 4)).costs
    parent = Architecture.of([Block(8), Block(8)])
    rows = {(layer, block): pair[layer] for block, pair in damages.items() for layer in (0, 1)}
    return BlockLibrary.of(parent, rows, replace(costs, parent=parent))

"""Baselines keep the limits that they say they keep, and never beat the search within its own."""

from dataclasses import replace

import pytest

from moesaic.core.errors import InfeasibleError
from moesaic.models.architecture import Architecture, Block
from moesaic.search.library import BlockLibrary, total, variants_of
from moesaic.search.search_architecture.baselines import (
    _notches,
    baselines,
    choose_greedily,
    choose_uniformly,
    keep_by_reap,
    match_cost,
    shrink_randomly,
)
from moesaic.search.search_architecture.search import Search
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from moesaic.search.space import SearchSpace
from tests.search.small_library import every_choice, keeps, make_library

CONFIG = SearchArchitectureConfig(
    limits={"long": Limits(throughput_ratio=1.3, memory_ratio=0.8), "short": Limits(throughput_ratio=1.2)},
    max_experts_ratio=0.75,
    min_windowed_share=0.3,
)


@pytest.mark.parametrize("used", [(2,), (2, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_no_baseline_beats_the_search(seed: int, used: tuple[int, ...]) -> None:
    library = make_library(seed, num_layers=6, counts=(8, 6, 4, 2), used=used)
    search = Search.of(library, CONFIG)
    best = search.best()
    makers = baselines(search, best)
    with pytest.raises(InfeasibleError, match=r"nothing on offer to all layers \(expert width\)"):
        makers.pop("uniform_width")()
    alike = {makers.pop(name)().choice for name in ("uniform_memory", "uniform_throughput")}
    assert all(len({block.num_experts for block in library.architecture(choice).blocks}) == 1 for choice in alike)
    found = {name: find() for name, find in makers.items()}
    assert set(found) == {*("greedy", "uniform", "uniform_reap", "max_parameters", "random-0", "random-1", "random-2")}
    for name, solution in found.items():
        assert keeps(library, CONFIG, solution.choice), name
        assert solution.damage >= best.damage * (1 - 1e-6), name


def test_uniform_narrows_experts_or_leaves_some_out_by_reap() -> None:
    """Either way half of the experts' parameters go, 1.3 of 2.1 million are left; all of uniform may do either."""
    whole, fewer, narrower = Block(8, 2, 64), Block(4, 2, 64), Block(8, 2, 32)
    library = _two_layers({whole: (0.0, 0.0), fewer: (0.1, 0.2), narrower: (0.3, 0.1)})
    search = Search.of(library, SearchArchitectureConfig(max_parameters_ratio=0.7))
    makers = baselines(search, search.best())
    uniform, reap, width = (makers[name]() for name in ("uniform", "uniform_reap", "uniform_width"))
    assert uniform.architecture.blocks == reap.architecture.blocks == (fewer, fewer)
    assert width.architecture.blocks == (narrower, narrower)
    assert (uniform.known_damage, uniform.keeps) == (pytest.approx(0.3), "order")
    assert (reap.known_damage, reap.keeps) == (None, "reap"), "the scores are of other experts"
    assert width.known_damage == pytest.approx(0.4)
    looser = Search.of(library, SearchArchitectureConfig(max_parameters_ratio=1))
    assert keep_by_reap(looser).keeps == "order", "where none go there is nothing to choose"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", ["memory_mib", "throughput_tokens_per_s"])
def test_uniform_matches_one_cost_of_the_childs_alone(seed: int, cost: str) -> None:
    """Brute force over all uniform ones: of the two full layers none, the second, or both have one window."""
    library = make_library(seed)
    search = Search.of(library, CONFIG)
    child, costs = search.best(), library.costs

    def is_enough(architecture: Architecture) -> bool:
        new, old = (getattr(costs.evaluate(each), cost) for each in (architecture, child.architecture))
        return all(new[name] <= old[name] if cost == "memory_mib" else new[name] >= old[name] for name in old)

    every = [
        Architecture.of(
            replace(block, num_experts=count, window=window if layer in turned else block.window)
            for layer, block in enumerate(library.parent.blocks)
        )
        for count in (8, 4)
        for window in (16, 8)
        for turned in ((), (3,), (1, 3))
    ]
    least = min((total(library.damages, library.choice(each)), each.blocks) for each in every if is_enough(each))
    found = match_cost(search, child, cost)
    assert (found.damage, found.architecture.blocks) == least
    assert bool(found.breaks) == (not keeps(library, CONFIG, found.choice))


def test_greedy_takes_the_least_damage_per_saving() -> None:
    """Layer 0 saves 4 experts for 1.0, layer 1 saves 2 for 0.3: per expert 0.25 against 0.15."""
    library = _two_layers({Block(8, 2, 64): (0.0, 0.0), Block(6, 2, 64): (9.0, 0.3), Block(4, 2, 64): (1.0, 9.0)})
    search = Search.of(library, SearchArchitectureConfig(max_experts_ratio=14 / 16))
    assert library.architecture(choose_greedily(search)).blocks == (Block(8, 2, 64), Block(6, 2, 64))
    tighter = Search.of(library, SearchArchitectureConfig(max_experts_ratio=12 / 16))
    assert library.architecture(choose_greedily(tighter)).blocks == (Block(4, 2, 64), Block(6, 2, 64))
    assert tighter.best().architecture.blocks == (Block(4, 2, 64), Block(8, 2, 64)), (
        "where greedy loses: it cannot take back"
    )


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


def test_uniform_uses_equally_many_experts_per_token_everywhere() -> None:
    """A latency that halving the experts per token alone reaches, since all of them must stay."""
    library = make_library(3, num_layers=6, used=(4, 2, 1))
    config = SearchArchitectureConfig(limits={"short": Limits(latency_ratio=0.6)})
    search = Search.of(library, config)
    blocks = library.architecture(choose_uniformly(search)).blocks
    assert {block.experts_per_token for block in blocks} < {1, 2}
    mixed = {block.experts_per_token for block in search.best().architecture.blocks}
    assert len(mixed) > 1, "the search need not"


def test_random_takes_one_axis_at_a_time() -> None:
    """A notch is the next value of one axis, on every axis."""
    block = Block(8, 2, 64)
    options = variants_of(block, SearchSpace(expert_counts=(6, 4), experts_per_token=(1,), windows=(16, 8)))
    found = {options[index] for index in _notches(options)[options.index(block)]}
    assert found == {Block(6, 2, 64), Block(8, 1, 64), Block(8, 2, 64, 16)}


def test_uniform_that_cannot_keep_the_limits_says_so() -> None:
    library = make_library(0)
    narrow = SearchArchitectureConfig(max_experts_ratio=0.4)
    with pytest.raises(InfeasibleError, match="nothing on offer to all layers"):
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
    search = Search.of(library, config)
    solution = baselines(search, search.best())["max_parameters"]()
    feasible = [choice for choice in every_choice(library) if keeps(library, config, choice)]
    most = max(library.costs.evaluate(library.architecture(choice)).parameters for choice in feasible)
    assert solution.cost.parameters == most
    assert solution.objective == "-parameters" and solution.status == "optimal"


def _two_layers(damages: dict[Block, tuple[float, float]]) -> BlockLibrary:
    costs = make_library(0, counts=(8, 6, 4)).costs
    narrower = {Block(8, 2, 32, None): replace(costs.blocks[Block(8, 2, 64)], parameters=400_000)}
    parent = Architecture.of([Block(8, 2, 64), Block(8, 2, 64)])
    rows = {(layer, block): pair[layer] for block, pair in damages.items() for layer in (0, 1)}
    return BlockLibrary.of(parent, rows, replace(costs, parent=parent, blocks=costs.blocks | narrower))

"""The search over gpt-oss-120b with the recipes' limits, modelled costs, and damages that follow the paper's picture.

The damages are made up (``benchmarks/h100_search.py``): early layers need their experts more, and the layers whose
windows were released lose least by one. Nothing but costs and limits says how many experts and windows there are.
"""

import pytest

from benchmarks.h100_search import PARENT, RECIPES, RELEASED, library
from moesaic.pipelines.recipes import RECIPES as ALL_RECIPES
from moesaic.search.library import total
from moesaic.search.search_architecture.search import Search
from moesaic.search.search_architecture.stage import Limits


def test_at_its_own_figures_the_released_layout_is_the_best() -> None:
    recipe = RECIPES[8]
    found = library(recipe.measure_costs)
    costs = found.costs.evaluate(RELEASED)
    limits = {
        name: Limits(memory_mib=costs.memory_mib[name], throughput_tokens_per_s=costs.throughput_tokens_per_s[name])
        for name in ("long", "short")
    }
    assert Search.of(found, recipe.search_architecture.but(limits=limits)).best().architecture == RELEASED


@pytest.mark.parametrize("num_gpus", RECIPES)
def test_the_recipes_limits_lead_to_the_released_layout(num_gpus: int) -> None:
    """Up to two blocks, whose expert counts take up what the limits were rounded by."""
    recipe = RECIPES[num_gpus]
    found = library(recipe.measure_costs)
    search = Search.of(found, recipe.search_architecture.but(frontier_points=3))
    assert search.limits.broken(found.choice(RELEASED)) == []
    assert search.limits.broken(found.choice(PARENT)) != []
    name, frontier = search.frontier()
    best = search.best()
    assert name == "throughput of long"
    assert best.damage == pytest.approx(frontier[0].damage) and best.architecture.layouts == RELEASED.layouts
    assert best.damage <= total(found.damages, found.choice(RELEASED)) <= 1.05 * best.damage
    assert sum(mine == theirs for mine, theirs in zip(best.architecture.blocks, RELEASED.blocks, strict=True)) >= 34


@pytest.mark.parametrize("name", [name for name in ALL_RECIPES if name.startswith("gpt_oss")])
def test_no_recipe_for_gpt_oss_types_the_answer_in(name: str) -> None:
    recipe = ALL_RECIPES[name]()
    for search in (recipe.search_architecture, recipe.earlier_search_architecture):
        assert search.max_experts_ratio is None and search.min_windowed_share == 0
    assert recipe.score_blocks.metric == "kl"
    longest = max(load.input_tokens + load.output_tokens for load in recipe.measure_costs.workloads)
    assert recipe.score_blocks.max_long_tokens == longest
    experts = recipe.export_engine.expert_parallel_size
    assert experts == (recipe.measure_costs.num_gpus if recipe.measure_costs.expert_parallel else 1)
    assert recipe.export_engine.target == recipe.measure_costs.engine

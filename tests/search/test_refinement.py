"""Refinement by measurement: what is learnt against sums written out, and proposals against every assembly there is."""

import math
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from moesaic.models.architecture import Block
from moesaic.search.library import BlockLibrary, Choice, total
from moesaic.search.refine_architecture.interactions import Evaluation, LearntDamage, _Blocks
from moesaic.search.refine_architecture.refinement import propose
from moesaic.search.search_architecture.search import Search
from moesaic.search.search_architecture.stage import Limits, SearchArchitectureConfig
from tests.search.small_library import every_choice, keeps, make_library

CONFIG = SearchArchitectureConfig(limits={"long": Limits(memory_ratio=0.7, throughput_ratio=1.2)})


def graded_library(seed: int, num_layers: int = 6) -> BlockLibrary:
    """The more a block loses the more harm it does, in all layers nearly alike: many sums are nearly equal."""
    library = make_library(seed, num_layers, (8, 6, 4))
    generator = np.random.default_rng(seed)

    def damage(block: Block, own: Block) -> float:
        lost = 1 - block.num_experts / own.num_experts + (0.0 if block.window == own.window else 2 / block.window)
        return lost * generator.uniform(0.8, 1.2)

    rows = zip(library.variants, library.parent.blocks, strict=True)
    return replace(library, damages=tuple(tuple(damage(block, own) for block in options) for options, own in rows))


class TrueDamage:
    """Assemblies whose damage is the energy of the sum of their blocks' errors.

    Errors of one layer's variants with one window point nearly the same way, and all errors a little the same way.
    """

    def __init__(self, library: BlockLibrary, seed: int) -> None:
        generator = np.random.default_rng(seed)
        common = generator.normal(size=12)
        self.errors = []
        for options, row in zip(library.variants, library.damages, strict=True):
            ways = {block.window: 0.5 * common + generator.normal(size=12) for block in options}
            errors = np.array([ways[block.window] + 0.1 * generator.normal(size=12) for block in options])
            lengths = np.linalg.norm(errors, axis=1, keepdims=True)
            self.errors.append(errors / lengths * np.sqrt(np.array(row))[:, None])

    def __call__(self, choice: Choice) -> float:
        return float(np.square(sum(errors[index] for errors, index in zip(self.errors, choice, strict=True))).sum())


def test_blocks_that_differ_in_experts_alone_are_of_a_kind():
    library = make_library(3, counts=(8, 4, 2), used=(2, 1))
    kinds = _Blocks.of(library).kinds
    for options, row in zip(library.variants, kinds, strict=True):
        for (block, kind), (other, its) in product(zip(options, row[: len(options)], strict=True), repeat=2):
            assert (kind == its) == (replace(block, num_experts=8) == replace(other, num_experts=8))


def guess(learnt: LearntDamage, choice: Choice) -> float:
    return float(learnt.expected(np.array([choice]))[0])


def test_single_blocks_have_the_damage_of_their_score():
    library = make_library(3)
    damage = TrueDamage(library, 0)
    choice = list(library.parent_choice)
    choice[1] = 2
    assert damage(tuple(choice)) == pytest.approx(library.damages[1][2])


def test_the_covariance_is_the_sum_over_pairs():
    """q(x) q(y) + 4 sum over pairs of min(d_i, d'_i) min(d_j, d'_j), windows alike; every term written out."""
    library = make_library(5, num_layers=3)
    first, second = (1, 5, 1), (1, 4, 0)
    learnt = LearntDamage.of(library, [])
    (found,) = learnt.blocks.covariance(np.array([first]), np.array([second])).flatten()
    same = np.array([first])
    assert learnt.blocks.variance(same) == pytest.approx(learnt.blocks.covariance(same, same)[0])
    d, e = ([row[index] for row, index in zip(library.damages, choice, strict=True)] for choice in (first, second))
    shared = [
        min(x, y) if options[i].window == options[j].window else 0.0
        for x, y, options, i, j in zip(d, e, library.variants, first, second, strict=True)
    ]
    pairs = [(i, j) for i, j in product(range(3), range(3)) if i != j]
    expected = sum(math.sqrt(d[i] * d[j]) for i, j in pairs) * sum(math.sqrt(e[i] * e[j]) for i, j in pairs)
    expected += 4 * sum(shared[i] * shared[j] for i, j in pairs if i < j)
    assert found == pytest.approx(expected, rel=1e-12)


def test_without_measurements_damages_add_up():
    library = make_library(1)
    learnt = LearntDamage.of(library, [])
    for choice in every_choice(library)[::37]:
        assert guess(learnt, choice) == pytest.approx(total(library.damages, choice))


@pytest.mark.parametrize("seed", range(3))
def test_measured_assemblies_are_known_and_others_are_guessed_better_than_by_sums(seed: int):
    library = make_library(seed)
    damage, generator = TrueDamage(library, seed), np.random.default_rng(seed)
    every = every_choice(library)
    choices = [every[index] for index in generator.permutation(len(every))[:60]]
    known, others = choices[:24], choices[24:]
    learnt = LearntDamage.of(library, [Evaluation(choice, damage(choice)) for choice in known])
    for choice in known:
        missing = damage(choice) - total(library.damages, choice)
        assert guess(learnt, choice) == pytest.approx(damage(choice), abs=0.2 * abs(missing) + 0.05)
    errors = [guess(learnt, choice) - damage(choice) for choice in others]
    by_sums = [total(library.damages, choice) - damage(choice) for choice in others]
    assert np.square(errors).mean() < 0.5 * np.square(by_sums).mean()


def test_around_an_assembly_a_change_of_one_layer_is_exact():
    library = make_library(2)
    damage = TrueDamage(library, 1)
    known = every_choice(library)[5::29][:10]
    learnt = LearntDamage.of(library, [Evaluation(choice, damage(choice)) for choice in known])
    centre = known[3]
    table = learnt.around(centre)
    for layer, options in enumerate(library.variants):
        for index in range(len(options)):
            changed = (*centre[:layer], index, *centre[layer + 1 :])
            assert total(table, changed) == pytest.approx(float(learnt.promise(np.array([changed]))[0]), abs=1e-9)


def test_proposals_keep_the_limits_and_nearly_reach_the_best_assembly():
    """Mean over three problems of the least damage after 17 measurements, as a multiple of the least there is.

    The search's own choice is more than twice as bad as the best.
    """
    ratios = []
    for seed in range(3):
        library = graded_library(seed)
        search, damage = Search.of(library, CONFIG), TrueDamage(library, seed)
        allowed = [choice for choice in every_choice(library) if search.limits.holds(choice)]
        start = search.best().choice
        measured = [Evaluation(start, damage(start))]
        while len(measured) < 17:
            choices = propose(search, measured, 4)
            assert all(keeps(library, CONFIG, choice) for choice in choices)
            for one, other in combinations(choices, 2):
                assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2
            measured += [Evaluation(choice, damage(choice)) for choice in choices]
        assert len({evaluation.choice for evaluation in measured}) == len(measured)
        best = min(damage(choice) for choice in allowed)
        ratios.append((damage(start) / best, min(evaluation.damage for evaluation in measured) / best))
    chosen, refined = np.exp(np.log(ratios).mean(0))
    assert chosen > 2
    assert refined < 1.1


def test_proposals_end_where_the_limits_leave_no_more():
    """Two layers, of which one may change: three assemblies keep the limits, then there is none."""
    library = make_library(0, num_layers=2)
    only = {choice for choice in every_choice(library) if keeps(library, CONFIG, choice)}
    search = Search.of(library, CONFIG)
    measured = [Evaluation(search.best().choice, 1.0)]
    while choices := propose(search, measured, 1):
        measured += [Evaluation(choice, 1.0) for choice in choices]
    assert {evaluation.choice for evaluation in measured} == only


def test_grouped_caches_are_kept_too():
    library = make_library(1, engine="vllm")
    search = Search.of(library, CONFIG)
    start = search.best().choice
    for choice in propose(search, [Evaluation(start, 1.0)], 3):
        assert search.limits.holds(choice)

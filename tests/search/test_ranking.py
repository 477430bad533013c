"""Expert ranking against brute force and hand-counted cases."""

import pytest
import torch
from torch import Tensor

from moesaic.models import layers, loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import RouterScores, Routing
from moesaic.search.rank_experts.ranking import (
    eliminate,
    order_experts,
    rank_layer,
    rank_randomly,
    rank_tallies,
    removal_differences,
    tally,
)


def routing(logits: list[list[float]], outputs: list[list[list[float]]], top_k: int) -> Routing:
    """Slots are the experts by falling logit, as many as a token has outputs."""
    table = torch.tensor(logits)
    energies = torch.zeros(table.shape[1], 1, dtype=torch.float64)
    return Routing(
        RouterScores(table, table, 1.0), table.topk(len(outputs[0])).indices, torch.tensor(outputs), top_k, energies
    )


@pytest.fixture
def states() -> Tensor:
    return torch.randn(200, 64, generator=torch.Generator().manual_seed(5))


def test_removal_difference_equals_removing_each_expert(tiny_checkpoint: Checkpoint, states: Tensor):
    """Brute force: slice expert e off the layer, run what is left, compare all tokens."""
    block = loading.load_block(tiny_checkpoint, 0)
    batches = [layers.route(block, part, num_spare=1) for part in states.split(70)]
    ranking = rank_layer("removal_difference", batches)
    whole, _ = block.mlp(states.unsqueeze(0))
    for expert in range(8):
        rest = layers.slice_block(block, [other for other in range(8) if other != expert])
        without, _ = rest.mlp(states.unsqueeze(0))
        expected = (whole - without).double().square().mean().item()
        assert ranking.scores[expert] == pytest.approx(expected, rel=1e-4)
    assert list(ranking.order) == sorted(range(8), key=lambda expert: -ranking.scores[expert])


def test_removal_difference_by_hand():
    """Top-1 of 3 experts, equal everywhere but in the output: removing 0 brings expert 1 in, 5 - 2 = 3, squared 9."""
    batch = routing([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]], [[[5.0], [2.0]], [[2.0], [1.0]]], top_k=1)
    assert removal_differences(batch).tolist() == [[9.0], [1.0]]
    ranking = rank_layer("removal_difference", [batch])
    assert ranking.scores == (4.5, 0.5, 0.0)
    assert ranking.order == (0, 1, 2)


def test_removal_difference_when_no_expert_is_left_to_enter():
    """Two experts of equal weight, both used: without one, the other has weight 1. y = 2, y' = 3 or 1."""
    batch = routing([[0.0, 0.0]], [[[1.0], [3.0]]], top_k=2)
    assert removal_differences(batch).tolist() == [[1.0, 1.0]]


def test_reap_is_a_mean_over_the_experts_own_tokens():
    """Top-1, weights 1: expert 0 returns norms 3 and 5 (mean 4), expert 1 once norm 10; by frequency 0 leads."""
    batch = routing([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[[3.0, 0.0]], [[3.0, 4.0]], [[6.0, 8.0]]], top_k=1)
    reap = rank_layer("reap", [batch])
    assert reap.scores == pytest.approx((4.0, 10.0))
    assert reap.order == (1, 0)
    frequency = rank_layer("frequency", [batch])
    assert frequency.scores == pytest.approx((2 / 3, 1 / 3))
    assert frequency.order == (0, 1)
    for criterion in ("frequency", "ranked_choice", "random"):
        assert rank_tallies("reap", [tally(criterion, batch)]) == reap, "it is counted beside every criterion"


def test_reap_weighs_by_the_renormalised_gate():
    """Two equal logits of three share the weight: 0.5 * 4 and 0.5 * 2."""
    ranking = rank_layer("reap", [routing([[0.0, 0.0, -9.0]], [[[4.0], [2.0]]], top_k=2)])
    assert ranking.scores == pytest.approx((2.0, 1.0, 0.0))


def test_ranked_choice_by_hand():
    """First choices: A 3, B 2, C 0, D 4. C goes, then B, whose voters move to A; then D, 4 to 5."""
    a, b, c, d = range(4)
    ballots = torch.tensor([[a, b, c, d]] * 3 + [[b, a, c, d], [b, c, a, d]] + [[d, a, b, c]] * 4)
    assert eliminate([ballots[:4], ballots[4:]], 4, top_k=1) == [c, b, d, a]


def test_ranked_choice_differs_from_frequency():
    """By first choice D leads; by elimination A wins, as everyone else prefers A to D."""
    order = [[3.0, 2.0, 1.0, 0.0]] * 3 + [[2.0, 3.0, 1.0, 0.0], [1.0, 3.0, 2.0, 0.0]] + [[2.0, 1.0, 0.0, 3.0]] * 4
    batch = routing(order, [[[1.0]]] * 9, top_k=1)
    assert rank_layer("frequency", [batch]).order[0] == 3
    assert rank_layer("ranked_choice", [batch]).order == (0, 3, 1, 2)


def test_experts_without_votes_are_eliminated_first():
    """Expert 0 is everyone's third choice and nobody's first two; expert 3 has one vote."""
    logits = [[1.0, 3.0, 2.0, 0.0]] * 5 + [[1.0, 3.0, 0.0, 2.0]]
    ballots = torch.tensor(logits).argsort(descending=True)
    assert eliminate([ballots], 4, top_k=2)[:2] == [0, 3]


def test_elimination_equals_counting_from_scratch_each_round():
    ballots = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(seed)) for seed in range(80)])
    ballots[:, [0, 1]] = ballots[:, [1, 0]]
    left, expected = list(range(12)), []
    while len(left) > 1:
        seats = min(3, len(left) - 1)
        votes = dict.fromkeys(left, 0)
        for ballot in ballots.tolist():
            for expert in [choice for choice in ballot if choice in left][:seats]:
                votes[expert] += 1
        loser = min(left, key=lambda expert: (votes[expert], -expert))
        expected.append(loser)
        left.remove(loser)
    assert eliminate(list(ballots.split(33)), 12, top_k=3) == [*expected, *left]


@pytest.mark.parametrize("criterion", ["removal_difference", "ranked_choice", "reap", "frequency"])
def test_scores_are_by_expert_id_and_not_a_permutation_of_ranks(criterion, tiny_checkpoint: Checkpoint, states: Tensor):
    """The trap: an argsort used as a score. Following the order, true scores must fall."""
    block = loading.load_block(tiny_checkpoint, 3)
    ranking = rank_layer(criterion, [layers.route(block, states, num_spare=1)])
    along = [ranking.scores[expert] for expert in ranking.order]
    assert along == sorted(along, reverse=True)
    assert sorted(ranking.order) == list(range(8))
    assert tuple(ranking.scores) != tuple(float(expert) for expert in ranking.order)


@pytest.mark.parametrize("criterion", ["removal_difference", "ranked_choice", "reap", "frequency"])
def test_batches_do_not_matter(criterion, tiny_checkpoint: Checkpoint, states: Tensor):
    block = loading.load_block(tiny_checkpoint, 3)
    whole = rank_layer(criterion, [layers.route(block, states, num_spare=1)])
    parts = rank_layer(criterion, [layers.route(block, part, num_spare=1) for part in states.split(13)])
    assert parts.order == whole.order
    assert parts.scores == pytest.approx(whole.scores, rel=1e-4)  # means of squares, which double a relative error


def test_never_routed_experts_come_last():
    """Expert 1 was routed to and its removal changes nothing; expert 0 and 2 were never seen."""
    assert order_experts([0.0, 0.0, 0.0, 7.0], [0.0, 4.0, 0.0, 2.0]).order == (3, 1, 0, 2)


def test_random_depends_on_the_seed_alone():
    assert rank_randomly(16, 1) == rank_randomly(16, 1)
    assert rank_randomly(16, 1).order != rank_randomly(16, 2).order

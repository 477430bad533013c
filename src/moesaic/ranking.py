"""The order in which a layer's experts matter (paper A, expert pruning; these formulas are ours).

With z the router's logits of a token, S its top-k experts, w = softmax(z[S]) and f_e(x) the output of expert e::

    y = sum_{e in S} w_e f_e(x)

``removal_difference`` (default)
    score_e = 1/T * sum over tokens with e in S of mse(y, y'), where y' is the layer's output once z_e is -inf: the
    next-best expert enters S, and w is the softmax over the new S. T counts all tokens, so rare experts score low.
    Whichever expert is removed, the same one enters: one more expert output per token serves all k removals.
``ranked_choice``
    Instant-runoff voting. Each token votes for the k experts it would be routed to; the expert with the fewest votes is
    eliminated and its voters move to their next choice. score_e = the round e was eliminated in / E. Once k experts are
    left, each token votes for one fewer than are left. Memory: the order of each token, one or two bytes per expert, of
    one layer at a time, less than the layer's input states take.
``reap``
    score_e = mean over the tokens routed to e of w_e * ||f_e(x)||.
``frequency``
    score_e = share of tokens routed to e.
``random``
    The baseline: a seeded shuffle that looks at nothing.

Sums are float64. Scores are indexed by expert id, larger is better; the order is another thing, computed from them.
Experts no token was routed to come last; ties go to the lower id.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from moesaic.blocks import Routing
from moesaic.configs import Criterion

NUM_SPARE = {"removal_difference": 1}
"""Expert outputs beyond the top k that a criterion needs; 0 where not listed."""


@dataclass(frozen=True)
class LayerRanking:
    """One layer's experts in order of importance."""

    order: tuple[int, ...]
    """Expert ids, most important first."""
    scores: tuple[float, ...]
    """By expert id."""


def rank_layer(criterion: Criterion, batches: Iterable[Routing], num_experts: int) -> LayerRanking:
    """Rank one layer's experts from how its tokens were routed; batches are seen once and not kept.

    Args:
        criterion: any but ``random``, for which see :func:`rank_randomly`.
        batches: routings of real tokens, without padding.
        num_experts: experts of the layer.
    """
    if criterion == "ranked_choice":
        return _rank_by_votes([(_ballots(batch), batch.top_k) for batch in batches], num_experts)
    sums = torch.zeros(num_experts, dtype=torch.float64)
    counts = torch.zeros(num_experts, dtype=torch.float64)
    num_tokens = 0
    for batch in batches:
        chosen = batch.expert_ids[:, : batch.top_k].flatten().cpu()
        counts += chosen.bincount(minlength=num_experts)
        num_tokens += batch.logits.shape[0]
        sums.index_add_(0, chosen, _contributions(criterion, batch).flatten().double().cpu())
    totals = counts if criterion == "reap" else torch.full_like(counts, num_tokens)
    return order_experts((sums / totals.clamp_min(1)).tolist(), counts.tolist())


def rank_randomly(num_experts: int, seed: int) -> LayerRanking:
    """A shuffle that depends on the seed alone."""
    scores = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return order_experts(scores.tolist(), [1.0] * num_experts)


def order_experts(scores: Sequence[float], counts: Sequence[float]) -> LayerRanking:
    """Sort expert ids by score, those that were never routed to after all others."""
    order = sorted(range(len(scores)), key=lambda expert: (counts[expert] == 0, -scores[expert], expert))
    return LayerRanking(tuple(order), tuple(scores))


def removal_differences(routing: Routing) -> Float[Tensor, "token slot"]:
    """For each token and each of its top-k experts, mse(y, y') of removing that expert."""
    outputs, logits = routing.outputs.float(), routing.chosen_logits().float()
    mixture = routing.mixture().float()
    columns = []
    for slot in range(routing.top_k):
        rest = torch.cat((logits[:, :slot], logits[:, slot + 1 :]), dim=1)[:, : routing.top_k]
        others = torch.cat((outputs[:, :slot], outputs[:, slot + 1 :]), dim=1)[:, : routing.top_k]
        without = torch.einsum("ts,tsh->th", torch.softmax(rest, dim=-1), others)
        columns.append((mixture - without).double().square().mean(-1))
    return torch.stack(columns, dim=1)


def weighted_norms(routing: Routing) -> Float[Tensor, "token slot"]:
    """For each token and each of its top-k experts, the weight times the L2 norm of the output."""
    norms: Tensor = routing.outputs[:, : routing.top_k].float().norm(dim=-1)
    return routing.weights() * norms


def _contributions(criterion: Criterion, batch: Routing) -> Float[Tensor, "token slot"]:
    if criterion == "removal_difference":
        return removal_differences(batch)
    if criterion == "reap":
        return weighted_norms(batch)
    if criterion == "frequency":
        return torch.ones(batch.logits.shape[0], batch.top_k)
    raise ValueError(f"{criterion} is not computed from expert outputs")


def _ballots(batch: Routing) -> Integer[Tensor, "token expert"]:
    small = torch.uint8 if batch.logits.shape[1] <= 256 else torch.int16
    return batch.logits.argsort(dim=-1, descending=True, stable=True).to("cpu", small)


def _rank_by_votes(batches: Sequence[tuple[Tensor, int]], num_experts: int) -> LayerRanking:
    rounds = eliminate([ballots for ballots, _ in batches], num_experts, batches[0][1])
    scores = [0.0] * num_experts
    for turn, expert in enumerate(rounds):
        scores[expert] = turn / num_experts
    return LayerRanking(tuple(reversed(rounds)), tuple(scores))


def eliminate(ballots: Sequence[Tensor], num_experts: int, top_k: int) -> list[int]:
    """Expert ids in the order of their elimination, the winner last; of equals the higher id goes first.

    Args:
        ballots: every token's experts, best first, in batches [token expert].
        num_experts: experts of the layer.
        top_k: votes of each token.
    """
    alive = torch.ones(num_experts, dtype=torch.bool)
    votes = [_choices(batch, alive, top_k) for batch in ballots]
    rounds: list[int] = []
    while len(rounds) < num_experts - 1:
        seats = min(top_k, num_experts - len(rounds) - 1)
        counts = torch.stack([chosen[:, :seats].flatten().bincount(minlength=num_experts) for chosen in votes]).sum(0)
        loser = min((int(counts[expert]), -expert, expert) for expert in range(num_experts) if alive[expert])[-1]
        alive[loser] = False
        rounds.append(loser)
        for batch, chosen in zip(ballots, votes, strict=True):
            moved = (chosen == loser).any(1)
            chosen[moved, :seats] = _choices(batch[moved], alive, seats)
    return [*rounds, int(alive.nonzero())]


def _choices(ballots: Tensor, alive: Tensor, seats: int) -> Tensor:
    """The first ``seats`` experts of each ballot that are still in the race, best first."""
    standing = alive[ballots.long()]
    return ballots[standing & (standing.cumsum(1) <= seats)].view(len(ballots), seats).long()

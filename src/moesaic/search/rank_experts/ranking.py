"""The order in which a layer's experts matter (paper A, expert pruning; these formulas are ours).

With S a token's top-k experts, w their weights (both as its family chooses and weights them,
:mod:`moesaic.models.layers`) and f_e(x) the output of expert e::

    y = sum_{e in S} w_e f_e(x)

``removal_difference`` (default)
    score_e = 1/T * sum over tokens with e in S of mse(y, y'), where y' is the layer's output once e is gone: the
    next-best expert enters S, and w is that of the new S. T counts all tokens, so rare experts score low.
    Whichever expert is removed, the same one enters: one more expert output per token serves all k removals.
``ranked_choice``
    Instant-runoff voting. Each token votes for the k experts it would be routed to; the expert with the fewest votes is
    eliminated and its voters move to their next choice. score_e = the round e was eliminated in / E. Once k experts are
    left, each token votes for one fewer than are left. Memory: the order of each token, one or two bytes per expert, of
    one layer at a time, less than the layer's input states take.
``reap``
    score_e = mean over the tokens routed to e of w_e * ||f_e(x)|| (Lasby et al., arXiv 2510.13999).
    Every ranking has this order too: a baseline of the search keeps experts by it.
``frequency``
    score_e = share of tokens routed to e.
``random``
    The baseline: a seeded shuffle that looks at nothing.

Sums are float64. Scores are indexed by expert id, larger is better; the order is another thing, computed from them.
Experts no token was routed to come last; ties go to the lower id.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from moesaic.models.layers import Routing
from moesaic.search.rank_experts.stage import Criterion

_SUMMED: tuple[Criterion, ...] = ("removal_difference", "reap", "frequency")
"""Criteria that are sums over tokens."""
_TOKENS = 1024
"""Tokens whose removal differences are computed at once."""


@dataclass(frozen=True)
class LayerRanking:
    """One layer's experts in order of importance."""

    order: tuple[int, ...]
    """Expert ids, most important first."""
    scores: tuple[float, ...]
    """By expert id."""
    reap: tuple[int, ...] = ()
    """Expert ids in the order of ``reap``, whatever the criterion."""
    channels: Int[Tensor, "expert channel"] | None = field(default=None, compare=False)
    """By expert id, its channels in order of importance, see ``channels.py``."""

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        channels = None if self.channels is None else self.channels.tolist()
        return {"order": self.order, "scores": self.scores, "reap": self.reap, "channels": channels}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "LayerRanking":
        """Read what :meth:`as_json` wrote."""
        channels = None if entry["channels"] is None else torch.tensor(entry["channels"], dtype=torch.int32)
        return cls(tuple(entry["order"]), tuple(entry["scores"]), tuple(entry["reap"]), channels)


@dataclass(frozen=True)
class Tally:
    """What one batch says about a layer's experts; float64 on the host."""

    num_tokens: int
    top_k: int
    counts: Float[Tensor, " expert"]
    """Tokens that were routed to each expert."""
    sums: Mapping[Criterion, Float[Tensor, " expert"]]
    """Over those tokens, of ``reap`` and of the criterion, if that is a sum."""
    energies: Float[Tensor, "expert channel"]
    """Of every channel, over those tokens, see :class:`~moesaic.models.layers.Routing`."""
    ballots: Integer[Tensor, "token expert"] | None = None
    """Each token's experts, best first; for ``ranked_choice`` only."""

    @classmethod
    def of_none(cls, num_tokens: int) -> "Tally":
        """Of a layer without experts."""
        none = torch.zeros(0, dtype=torch.float64)
        return cls(num_tokens, 0, none, {}, none.view(0, 0))


def rank_layer(criterion: Criterion, batches: Iterable[Routing]) -> LayerRanking:
    """Rank one layer's experts from how its tokens were routed; batches are seen once and not kept.

    Args:
        criterion: any but ``random``, for which see :func:`rank_randomly`.
        batches: routings of real tokens, without padding.
    """
    return rank_tallies(criterion, [tally(criterion, batch) for batch in batches])


def tally(criterion: Criterion, batch: Routing) -> Tally:
    """Count one batch."""
    num_tokens, num_experts = batch.scores.choice.shape
    chosen = batch.expert_ids[:, : batch.top_k].flatten().cpu()
    counts = chosen.bincount(minlength=num_experts).double()
    sums = {
        name: torch.zeros(num_experts, dtype=torch.float64).index_add_(
            0, chosen, _contributions(name, batch).flatten().double().cpu()
        )
        for name in _SUMMED
        if name in (criterion, "reap")
    }
    ballots = _ballots(batch) if criterion == "ranked_choice" else None
    return Tally(num_tokens, batch.top_k, counts, sums, batch.energies.cpu(), ballots)


def rank_tallies(criterion: Criterion, tallies: Sequence[Tally]) -> LayerRanking:
    """Rank one layer's experts from the tallies of all batches, which are added up in the order given."""
    if criterion == "ranked_choice":
        ballots = [each.ballots for each in tallies if each.ballots is not None]
        return _rank_by_votes(ballots, len(tallies[0].counts), tallies[0].top_k)
    parts = zip(*((each.sums[criterion], each.counts) for each in tallies), strict=True)
    sums, counts = (torch.stack(part).sum(0) for part in parts)
    num_tokens = sum(each.num_tokens for each in tallies)
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
    """For each token and each of its top-k experts, mse(y, y') of removing that expert.

    With w the weights and w' those once the expert is gone, both 0 where an expert is not mixed::

        y' - y = sum_e (w'_e - w_e) f_e(x)
    """
    ids, top_k, weights = routing.expert_ids, routing.top_k, partial(routing.scores.weights, dtype=torch.float32)
    shifts = torch.zeros(ids.shape[0], top_k, ids.shape[1], device=ids.device)
    for slot in range(top_k):
        rest = [other for other in range(ids.shape[1]) if other != slot][:top_k]
        shifts[:, slot, rest] = weights(ids[:, rest])
    shifts[:, :, :top_k] -= weights(ids[:, :top_k]).unsqueeze(1)
    pieces = zip(shifts.split(_TOKENS), routing.outputs.split(_TOKENS), strict=True)
    return torch.cat([(shift @ outputs.float()).double().square().mean(-1) for shift, outputs in pieces])


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
        return torch.ones(len(batch.expert_ids), batch.top_k)
    raise ValueError(f"{criterion} is not a sum over tokens")


def _ballots(batch: Routing) -> Integer[Tensor, "token expert"]:
    choice = batch.scores.choice
    small = torch.uint8 if choice.shape[1] <= 256 else torch.int16
    return choice.argsort(dim=-1, descending=True, stable=True).to("cpu", small)


def _rank_by_votes(ballots: Sequence[Tensor], num_experts: int, top_k: int) -> LayerRanking:
    rounds = eliminate(ballots, num_experts, top_k)
    scores = [0.0] * num_experts
    for index, expert in enumerate(rounds):
        scores[expert] = index / num_experts
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

"""Whether an engine computes what transformers computes, by its greedy replies and their log-probabilities.

The reference reads an engine's reply, token by token, and says at each what itself would have chosen and how likely it
finds the engine's choice. So one pass over prompt and reply decides what decoding by the reference would: a reply is
the reference's own, token for token, if and only if its every token is the most likely one given those before it.
Engines round (BF16, order of sums), so two tokens that are about as likely may change places; the difference in
log-probability at such a place, the *gap*, says whether it was such a tie. A reply *agrees* if all gaps are near ties::

    gap = log p(reference's choice) - log p(engine's choice), both by the reference    [nats, 0 where they are the same]

Reading on after a difference keeps all later tokens comparable, as they are judged given the engine's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class JudgedReply:
    """One reply of the engine as the reference sees it, by token."""

    gaps: tuple[float, ...]
    """0 where the reference would have chosen the same."""
    logprob_differences: tuple[float, ...]
    """Absolute difference of the log-probability of the engine's choice."""


@dataclass(frozen=True)
class Agreement:
    """The replies of an engine at one effort, all together."""

    replies: int
    equal: int
    """Replies that are the reference's, token for token."""
    agreeing: int
    """Replies that are, but for near ties."""
    tokens: int
    largest_gap: float
    mean_logprob_difference: float

    @classmethod
    def of(cls, judged: Sequence[JudgedReply], near_tie: float) -> "Agreement":
        """Summarize replies, at least one; a gap of ``near_tie`` nats is the largest that counts as one."""
        differences = [value for reply in judged for value in reply.logprob_differences]
        return cls(
            replies=len(judged),
            equal=sum(not any(reply.gaps) for reply in judged),
            agreeing=sum(max(reply.gaps) <= near_tie for reply in judged),
            tokens=len(differences),
            largest_gap=max(gap for reply in judged for gap in reply.gaps),
            mean_logprob_difference=sum(differences) / len(differences),
        )


def judge(
    model: PreTrainedModel, prompt: Sequence[int], reply: Sequence[int], logprobs: Sequence[float]
) -> JudgedReply:
    """Hold one greedy reply of an engine against the reference.

    Args:
        model: the reference; whatever it emulates of a KV cache counts, since it reads with a cache.
        prompt: token ids.
        reply: token ids, at least one, the stop id included.
        logprobs: of the reply's tokens, by the engine.
    """
    token_ids = torch.tensor([[*prompt, *reply]], device=model.device)
    with torch.inference_mode():
        logits = model(token_ids[:, :-1], use_cache=True).logits[0]
    return compare(logits[len(prompt) - 1 :].float().cpu(), torch.tensor(reply), torch.tensor(logprobs))


def compare(
    logits: Float[Tensor, "token vocab"], reply: Int[Tensor, " token"], logprobs: Float[Tensor, " token"]
) -> JudgedReply:
    """The same, given the reference's logits where it was to choose each token."""
    likely = logits.log_softmax(-1)
    own = likely.gather(1, reply[:, None])[:, 0]
    gaps = likely.amax(-1) - own
    return JudgedReply(tuple(gaps.tolist()), tuple((own - logprobs).abs().tolist()))

"""What a reply earns in reinforcement learning: a verified answer, its form, and its length against the parent's own.

Paper A trains two policies from the distilled checkpoint, one at high effort and one at mixed efforts with length
regularisation, and averages them. Its reward is not known; this one is our choice::

    r = correct * [the answer is right] * (1 - length * p),    p = max(0, 1 - L_ref / L)
      + format  * [the reply is well formed]

L is the reply's length in tokens, its stop token included; L_ref the mean length of the parent's replies to the same
task at the same effort, truncated ones included: one mean over all tasks would price a task for being a long one. A
reply that is no longer than the parent's pays nothing, and a wrong one pays nothing for its length, so that no policy
learns to be wrong briefly. A truncated reply earns 0 in every part.

A right reply always earns more than a wrong one, however long it is: p < 1, so a right reply earns more than
``correct * (1 - length)``, and a wrong one at most ``format``, which the config keeps at or below that. At L = L_ref
the price per token is ``correct * length / L_ref``; it falls from there on, and all of it never exceeds
``correct * length``. So it is among the replies to one prompt; among prompts only where advantages are not divided by
the spread of rewards (``scale_rewards``), which makes the price of right replies as large as an answer elsewhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.recover.reinforce.stage import RewardConfig

EFFORT_FIGURES = (
    "reward",
    "reward_correct",
    "reward_format",
    "reward_length",
    "accuracy",
    "tokens_per_request",
    "truncated",
)
"""Figures of a reply. The training curve has their means per effort, under names that end with the effort."""

_TEXT = r"(?:(?!<\|\w+\|>).)*"
_MESSAGE = rf"\s*<\|channel\|>\s*\w+\b{_TEXT}<\|message\|>{_TEXT}"
_FINAL = rf"\s*<\|channel\|>\s*final\s*<\|message\|>{_TEXT}"
_WELL_FORMED = re.compile(
    rf"(?:{_MESSAGE}<\|end\|>\s*<\|start\|>\s*assistant)*{_FINAL}<\|(?:return|end)\|>\s*", re.DOTALL
)


ReferenceTokens = Mapping[tuple[str, str], float]
"""Mean length of the parent's replies by task and effort."""


@dataclass(frozen=True)
class Reward:
    """The parts of one reply's reward."""

    correct: float
    format: float
    length: float

    @property
    def total(self) -> float:
        """What the policy is trained on."""
        return self.correct + self.format + self.length


@dataclass(frozen=True)
class GradedReply:
    """A reply's reward and what it follows from."""

    reward: Reward
    correct: bool
    num_tokens: int
    truncated: bool

    @property
    def figures(self) -> dict[str, float]:
        """By the names of ``EFFORT_FIGURES``."""
        parts = (self.reward.total, self.reward.correct, self.reward.format, self.reward.length)
        values = (*parts, self.correct, self.num_tokens, self.truncated)
        return {name: float(value) for name, value in zip(EFFORT_FIGURES, values, strict=True)}


def grade_reply(
    text: str, num_tokens: int, truncated: bool, correct: bool, reference_tokens: float, config: RewardConfig
) -> GradedReply:
    """Grade one reply.

    Args:
        text: the decoded reply, channel markers included.
        num_tokens: its length, the stop token included.
        truncated: whether the token limit came before a stop token.
        correct: whether its answer is right; no truncated reply is.
        reference_tokens: the parent's mean length on the reply's task at its effort.
        config: what each part is worth.
    """
    excess = max(0.0, 1 - reference_tokens / num_tokens) if num_tokens else 0.0
    reward = Reward(
        correct=config.correct if correct else 0.0,
        format=config.format if not truncated and is_well_formed(text) else 0.0,
        length=-config.correct * config.length * excess if correct else 0.0,
    )
    return GradedReply(reward, correct, num_tokens, truncated)


def is_well_formed(text: str) -> bool:
    """Whether a reply is closed messages of named channels and nothing else, the last of them the ``final`` one."""
    return _WELL_FORMED.fullmatch(text) is not None

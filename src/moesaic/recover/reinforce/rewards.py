"""What a reply earns in reinforcement learning: a verified answer, its form, and its length against the parent's own.

Paper A trains two policies from the distilled checkpoint, one at high effort and one at mixed efforts with length
regularisation, and averages them. Its reward is not known; this one is our choice::

    r = correct * [the answer is right]
      + format  * [the reply is well formed]
      - length  * [the answer is right] * max(0, L / L_ref - 1)

L is the reply's length in tokens, its stop token included; L_ref the mean length of the parent's replies at the same
effort, truncated ones included. A reply that is no longer than the parent's pays nothing, and a wrong one pays nothing
for its length, so that no policy learns to be wrong briefly. A truncated reply earns 0 in every part.
"""

import re
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
        reference_tokens: the parent's mean length at the reply's effort.
        config: what each part is worth.
    """
    excess = max(0.0, num_tokens / reference_tokens - 1)
    reward = Reward(
        correct=config.correct if correct else 0.0,
        format=config.format if not truncated and is_well_formed(text) else 0.0,
        length=-config.length * excess if correct else 0.0,
    )
    return GradedReply(reward, correct, num_tokens, truncated)


def is_well_formed(text: str) -> bool:
    """Whether a reply is closed messages of named channels and nothing else, the last of them the ``final`` one."""
    return _WELL_FORMED.fullmatch(text) is not None

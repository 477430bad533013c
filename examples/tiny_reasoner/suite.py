"""What the trainer and the writer of data sets know of an example: its families, not what they ask."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import GptOssConfig

from examples.tiny_reasoner.trace import Trace

Effort = Literal["low", "medium", "high"]
Split = Literal["train", "calibration", "test"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
FAR_TOKENS = 128
"""The facts of a far problem stand more than this many tokens before its question."""


class Problem(Protocol):
    """One question with its answer; `identity` is what makes a problem the same problem."""

    @property
    def family(self) -> str:
        """The kind of problem."""

    @property
    def question(self) -> str:
        """What is asked."""

    @property
    def answer(self) -> str:
        """The one right answer."""

    @property
    def identity(self) -> str:
        """Equal for problems that must not lie in different splits."""

    def trace(self, effort: Effort, rng: random.Random) -> Trace:
        """An analysis at this effort, empty at low effort."""

    def after(self, context: str) -> "Problem":
        """The same problem with its context in front of the question."""


class Context(Protocol):
    """A text of facts that many questions can be asked about."""

    @property
    def text(self) -> str:
        """The words, which also decide the split."""

    @property
    def length(self) -> int:
        """How many words."""


def split_of(family: str, identity: str) -> Split:
    """The split a problem belongs to: 80 % train, 8 % calibration, 12 % test."""
    digest = hashlib.blake2b(f"{family}|{identity}".encode(), digest_size=4).digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < 80:
        return "train"
    return "calibration" if percent < 88 else "test"


@dataclass(frozen=True)
class Suite:
    """An example's families and its model.

    make_short(rng, family, level) draws a problem; level 0 is the easiest, 1 what the test asks.
    make_context(rng, family, length, num_facts) draws a context. make_question(rng, context, before, practice) draws a
    question whose facts all start before that token, or None when the draw finds none; practice also asks what is
    easier or longer than the test. loss_share is each effort's part of the tokens that carry loss.
    """

    name: str
    short: tuple[str, ...]
    far: tuple[str, ...]
    make_short: Callable[[random.Random, str, float], Problem]
    make_context: Callable[[random.Random, str, int, int], Context]
    make_question: Callable[[random.Random, Context, int, bool], Problem | None]
    num_facts: tuple[int, int]
    loss_share: dict[Effort, float]
    config: Callable[[], GptOssConfig]

    @property
    def families(self) -> tuple[str, ...]:
        """All of them, short ones first."""
        return (*self.short, *self.far)

    def short_problem(self, rng: random.Random, family: str, split: Split, level: float = 1.0) -> Problem:
        """Draw until the problem falls into the split."""
        while True:
            problem = self.make_short(rng, family, level)
            if split_of(family, problem.identity) == split:
                return problem

    def split_context(self, rng: random.Random, family: str, split: Split, length: int, num_facts: int) -> Context:
        """Draw until the context falls into the split."""
        while True:
            context = self.make_context(rng, family, length, num_facts)
            if split_of(family, context.text) == split:
                return context

    def far_problem(self, rng: random.Random, family: str, split: Split) -> Problem:
        """A far problem as the test asks it: 250 to 400 tokens, its facts more than 128 tokens before the question."""
        while True:
            context = self.split_context(rng, family, split, rng.randint(250, 400), rng.randint(*self.num_facts))
            problem = self.make_question(rng, context, context.length - FAR_TOKENS, False)
            if problem is not None:
                return problem.after(context.text)

    def draw_problem(self, rng: random.Random, family: str, split: Split) -> Problem:
        """One problem as the test asks it."""
        return self.far_problem(rng, family, split) if family in self.far else self.short_problem(rng, family, split)

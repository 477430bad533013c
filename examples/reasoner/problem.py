"""A problem whose analysis at high effort is drawn anew each time, and steps that are checked and redone."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from examples.tiny_reasoner.suite import Effort
from examples.tiny_reasoner.trace import Trace

SLIP = 0.06
"""How often a step is first written wrong. It is then checked, found wrong and written again."""
CHECK = 0.12
"""How often a right step is checked."""
MOST_WORDS = 180
"""A longer analysis is drawn again: with its question and answer it must fit a row of 256 tokens."""


@dataclass(frozen=True)
class Problem:
    """One question with its answer; `identity` decides the split, `work` draws an analysis at high effort."""

    family: str
    question: str
    answer: str
    identity: str
    medium: str
    work: Callable[[random.Random], Trace]

    def trace(self, effort: Effort, rng: random.Random) -> Trace:
        """An analysis: empty at low effort, without checks at medium effort, drawn at random at high effort."""
        if effort != "high":
            return Trace().write(self.medium if effort == "medium" else "")
        while True:
            trace = self.work(rng)
            if len(trace.words) <= MOST_WORDS:
                return trace

    def after(self, context: str) -> "Problem":
        """The same problem with the context in front of its question."""
        return replace(self, question=f"{context} ; {self.question}")


@dataclass(frozen=True)
class Step:
    """What is computed, its result, another way to compute it with what that gives, and a wrong result."""

    work: str
    result: str
    proof: str
    wrong: Callable[[random.Random], str]


def write_step(rng: random.Random, trace: Trace, step: Step) -> None:
    """Write a step, sometimes checked: `check PROOF ok`. A wrong one is: `check PROOF no redo`, and the step again."""
    trace.write(step.work)
    while rng.random() < SLIP:
        trace.write(step.wrong(rng), "slip").write("check", "free").write(f"{step.proof} no redo {step.work}")
    trace.write(step.result)
    if rng.random() < CHECK:
        trace.write("check", "free").write(f"{step.proof} ok")


def write_steps(rng: random.Random, steps: list[Step]) -> Trace:
    """Steps in order, divided by `;`."""
    trace = Trace()
    for number, step in enumerate(steps):
        if number:
            trace.write(";", "free")
        write_step(rng, trace, step)
    return trace


def spell(number: int, width: int = 1) -> str:
    """A number digit by digit, with zeros in front up to this width."""
    return " ".join(str(number).zfill(width))


def other_digit(text: str) -> Callable[[random.Random], str]:
    """Draws the same number with one digit changed."""

    def draw(rng: random.Random) -> str:
        words = text.split()
        place = rng.randrange(len(words))
        words[place] = rng.choice([digit for digit in "0123456789" if digit != words[place]])
        return " ".join(words)

    return draw


def size(rng: random.Random, easiest: int, hardest: int, level: float, spread: int) -> int:
    """A size for this level: at most what it opens, at least `spread` below that."""
    most = easiest + round((hardest - easiest) * level)
    return rng.randint(max(easiest, most - spread), most)

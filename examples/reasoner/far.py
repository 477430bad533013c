"""Families whose facts stand far back, among other facts and filler: `retrieve`, `hops`, `latest`, `total`."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from examples.reasoner.problem import Problem, Step, other_digit, spell, write_steps
from examples.tiny_reasoner.tasks import scatter
from examples.tiny_reasoner.vocabulary import DIGITS, NAMES

FAR_FAMILIES = ("retrieve", "hops", "latest", "total")
LINKS = 6
"""How many facts a path of `hops` consists of."""
MOST = 9
"""Facts of a key that is asked for."""


@dataclass(frozen=True)
class Fact:
    """`> key value`, and at which token of the context it starts."""

    offset: int
    key: str
    value: str

    def __str__(self) -> str:
        return f"> {self.key} {self.value}"


@dataclass(frozen=True)
class FarContext:
    """Facts in the order of the text."""

    family: str
    text: str
    facts: tuple[Fact, ...]
    length: int


def retrieve_pairs(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Independent facts: no name is both a key and a value."""
    names = rng.sample(NAMES, 2 * num_facts)
    return list(zip(names[:num_facts], names[num_facts:], strict=True))


def hops_pairs(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Facts that form paths, so that every name has one next name or none."""
    num_paths = max(1, num_facts // LINKS)
    names = rng.sample(NAMES, (LINKS + 1) * num_paths)
    starts = [(LINKS + 1) * path + link for path in range(num_paths) for link in range(LINKS)]
    return [(names[start], names[start + 1]) for start in starts]


def drawn(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """So many names, one of them at most MOST times: of a context without such a one nothing can be asked."""
    while True:
        chosen = [rng.choice(names) for _ in range(count)]
        if min(Counter(chosen).values()) <= MOST:
            return chosen


def latest_pairs(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Keys that are given several values, all different."""
    num_keys = max(2, num_facts // 4)
    names = rng.sample(NAMES, num_keys + num_facts)
    return list(zip(drawn(rng, names[:num_keys], num_facts), names[num_keys:], strict=True))


def total_pairs(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Different keys, each with a number of one digit."""
    return [(name, rng.choice(DIGITS[1:])) for name in rng.sample(NAMES, num_facts)]


PAIRS: dict[str, Callable[[random.Random, int], list[tuple[str, str]]]] = {
    "retrieve": retrieve_pairs,
    "hops": hops_pairs,
    "latest": latest_pairs,
    "total": total_pairs,
}


def far_context(rng: random.Random, family: str, length: int, num_facts: int) -> FarContext:
    """A context of one of the families, `length` tokens or as many as its facts take."""
    text, placed = scatter(rng, PAIRS[family](rng, num_facts), length)
    return FarContext(family, text, tuple(Fact(*each) for each in placed), len(text.split()))


def far_question(rng: random.Random, context: FarContext, before: int, practice: bool) -> Problem | None:
    """A question whose facts all start before this token, or None when there is none."""
    return QUESTIONS[context.family](rng, context, before, practice)


def find(label: str, fact: Fact, others: Sequence[Fact]) -> Step:
    """A step that finds a fact's value; wrong is another value, one that another key has."""
    values = sorted({other.value for other in others if other.key != fact.key} - {fact.value}) or [fact.key]
    return Step(f"{label} > {fact.key}".strip(), fact.value, str(fact), lambda rng: rng.choice(values))


def retrieve_question(rng: random.Random, context: FarContext, before: int, practice: bool) -> Problem | None:
    """The values of two or three keys."""
    early = [fact for fact in context.facts if fact.offset < before]
    number = rng.choice((1, 1, 2, 3, 4) if practice else (2, 3))
    if len(early) < number:
        return None
    asked = rng.sample(early, number)
    answer = " ".join(fact.value for fact in asked)
    steps = [find("", fact, context.facts) for fact in asked]
    question = f"find {' '.join(fact.key for fact in asked)}"
    return Problem("retrieve", question, answer, context.text, answer, lambda rng: write_steps(rng, steps))


def path_from(facts: dict[str, Fact], start: str, hops: int) -> list[Fact] | None:
    """The facts on the path from start, or None when it ends early."""
    path, name = [], start
    for _ in range(hops):
        if name not in facts:
            return None
        path.append(facts[name])
        name = facts[name].value
    return path


def hops_question(rng: random.Random, context: FarContext, before: int, practice: bool) -> Problem | None:
    """The last name of a path of three to six links; the analysis counts the hops down."""
    hops = rng.randint(2 if practice else 3, LINKS)
    early = {fact.key: fact for fact in context.facts if fact.offset < before}
    paths = [path for start in early if (path := path_from(early, start, hops))]
    if not paths:
        return None
    path = rng.choice(paths)
    steps = [find(str(hops - place), fact, context.facts) for place, fact in enumerate(path)]
    medium = " ".join(f"{hops - place} {fact.value}" for place, fact in enumerate(path))
    question = f"from {path[0].key} hops {hops}"
    return Problem("hops", question, path[-1].value, context.text, medium, lambda rng: write_steps(rng, steps))


def groups(facts: Sequence[Fact], before: int) -> dict[str, list[Fact]]:
    """Facts by key, of the keys whose facts stand wholly before this token."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(fact.key, []).append(fact)
    return {key: group for key, group in found.items() if group[-1].offset < before and len(group) <= MOST}


def latest_question(rng: random.Random, context: FarContext, before: int, _practice: bool) -> Problem | None:
    """The last value of a key; its analysis writes the fact."""
    early = groups(context.facts, before)
    if not early:
        return None
    key = rng.choice(sorted(early))
    last = early[key][-1]
    step = find("", last, context.facts)
    return Problem("latest", f"latest {key}", last.value, context.text, str(last), lambda rng: write_steps(rng, [step]))


def total_question(rng: random.Random, context: FarContext, before: int, practice: bool) -> Problem | None:
    """The sum of three or four keys' numbers; medium effort lists the numbers, high effort adds one after the other."""
    early = [fact for fact in context.facts if fact.offset < before]
    number = rng.choice((2, 3, 4) if practice else (3, 4))
    if len(early) < number:
        return None
    asked = rng.sample(early, number)
    steps, total = [find("", asked[0], context.facts)], int(asked[0].value)
    for fact in asked[1:]:
        before_it, total = total, total + int(fact.value)
        steps += [find("", fact, context.facts), addition(before_it, int(fact.value))]
    medium = " ".join(fact.value for fact in asked)
    question = f"total {' '.join(fact.key for fact in asked)}"
    return Problem("total", question, spell(total), context.text, medium, lambda rng: write_steps(rng, steps))


def addition(first: int, second: int) -> Step:
    """A step that adds a digit, checked the other way round."""
    total = spell(first + second)
    proof = f"{second} + {spell(first)} = {total}"
    return Step(f"{spell(first)} + {second} =", total, proof, other_digit(total))


QUESTIONS: dict[str, Callable[[random.Random, FarContext, int, bool], Problem | None]] = {
    "retrieve": retrieve_question,
    "hops": hops_question,
    "latest": latest_question,
    "total": total_question,
}

"""Families whose facts stand far back, among other facts and filler: `retrieve`, `hops`, `latest`, `count`."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from examples.reasoner.problem import Problem, Step, write_steps
from examples.tiny_reasoner.tasks import scatter
from examples.tiny_reasoner.vocabulary import NAMES

FAR_FAMILIES = ("retrieve", "hops", "latest", "count")
LINKS = 6
"""How many facts a path of `hops` consists of."""
MOST = 9
"""Facts of a key or a value that is asked for: a digit counts them."""


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


def count_pairs(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Different keys with few different values."""
    num_values = max(2, num_facts // 4)
    names = rng.sample(NAMES, num_values + num_facts)
    return list(zip(names[num_values:], drawn(rng, names[:num_values], num_facts), strict=True))


PAIRS: dict[str, Callable[[random.Random, int], list[tuple[str, str]]]] = {
    "retrieve": retrieve_pairs,
    "hops": hops_pairs,
    "latest": latest_pairs,
    "count": count_pairs,
}


def far_context(rng: random.Random, family: str, length: int, num_facts: int) -> FarContext:
    """A context of one of the families, `length` tokens or as many as its facts take."""
    text, placed = scatter(rng, PAIRS[family](rng, num_facts), length)
    return FarContext(family, text, tuple(Fact(*each) for each in placed), len(text.split()))


def far_question(rng: random.Random, context: FarContext, before: int, practice: bool) -> Problem | None:
    """A question whose facts all start before this token, or None when there is none."""
    return QUESTIONS[context.family](rng, context, before, practice)


def find(label: str, fact: Fact, others: Sequence[Fact]) -> Step:
    """A step that finds a fact's value; wrong is what another key has."""
    values = sorted({other.value for other in others if other.key != fact.key}) or [fact.key]
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


def groups(facts: Sequence[Fact], before: int, part: str) -> dict[str, list[Fact]]:
    """Facts by key or by value, of those that stand wholly before this token."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(getattr(fact, part), []).append(fact)
    return {name: group for name, group in found.items() if group[-1].offset < before and len(group) <= MOST}


def latest_question(rng: random.Random, context: FarContext, before: int, _practice: bool) -> Problem | None:
    """The last value of a key; high effort lists all of them in order."""
    early = groups(context.facts, before, "key")
    if not early:
        return None
    key = rng.choice(sorted(early))
    group = early[key]
    steps = [find("", fact, context.facts) for fact in group]
    answer = group[-1].value
    return Problem("latest", f"latest {key}", answer, context.text, str(group[-1]), lambda rng: write_steps(rng, steps))


def count_question(rng: random.Random, context: FarContext, before: int, _practice: bool) -> Problem | None:
    """How many facts have this value; medium effort lists their keys, high effort numbers the facts."""
    early = groups(context.facts, before, "value")
    if not early:
        return None
    value = rng.choice(sorted(early))
    group = early[value]
    steps = [
        Step(f"{number} > {value}", fact.key, str(fact), other_key(context.facts, fact))
        for number, fact in enumerate(group, 1)
    ]
    medium = " ".join(fact.key for fact in group)
    answer = str(len(group))
    return Problem("count", f"count {value}", answer, context.text, medium, lambda rng: write_steps(rng, steps))


def other_key(facts: Sequence[Fact], right: Fact) -> Callable[[random.Random], str]:
    """Draws a key of a fact with another value."""
    keys = [fact.key for fact in facts if fact.value != right.value] or list(NAMES[:1])
    return lambda rng: rng.choice(keys)


QUESTIONS: dict[str, Callable[[random.Random, FarContext, int, bool], Problem | None]] = {
    "retrieve": retrieve_question,
    "hops": hops_question,
    "latest": latest_question,
    "count": count_question,
}

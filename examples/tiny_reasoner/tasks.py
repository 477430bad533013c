"""Six families of problems with known answers and worked traces.

`add`, `chain`, `sort` and `logic` need several steps of work; `retrieve` and `hops` need facts from far back. Every
family's answer follows from its question, and the trace at each effort is a function of the problem: no analysis at low
effort, results only at medium effort, every operand written out at high effort.

A problem belongs to exactly one split, by the hash of what makes it the same problem (the operands in sorted order
for `add`, the letters in sorted order for `sort`, the whole context for the far families): no seed can leak one into
another.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from examples.tiny_reasoner.model import reasoner_config
from examples.tiny_reasoner.suite import Effort, Suite
from examples.tiny_reasoner.trace import Trace
from examples.tiny_reasoner.vocabulary import FILLER, LETTERS, NAMES, STEPS

SHORT_FAMILIES = ("add", "chain", "sort", "logic")
FAR_FAMILIES = ("retrieve", "hops")


@dataclass(frozen=True)
class Problem:
    """One question with its answer; `identity` decides the split."""

    family: str
    question: str
    answer: str
    medium: str
    high: str
    identity: str

    def thinking(self, effort: Effort) -> str:
        """The analysis written at this effort; empty at low effort."""
        return {"low": "", "medium": self.medium, "high": self.high}[effort]

    def trace(self, effort: Effort, _rng: random.Random) -> Trace:
        """The analysis: here a function of the problem."""
        return Trace().write(self.thinking(effort))

    def after(self, context: str) -> "Problem":
        """The same problem with the context in front of its question."""
        return replace(self, question=f"{context} ; {self.question}")


def between(rng: random.Random, low: int, high: int, level: float) -> int:
    """A size from low up to the part of [low, high] that this level opens."""
    return rng.randint(low, low + round((high - low) * level))


def add_problem(rng: random.Random, level: float) -> Problem:
    """Two numbers of two or three digits, added column by column from the right."""
    width = 3 if rng.random() < 0.25 + 0.75 * level else 2
    first, second = (rng.randrange(10 ** (width - 1), 10**width) for _ in range(2))
    columns, digits, carry = [], [], 0
    for left, right in zip(reversed(str(first)), reversed(str(second)), strict=True):
        total = int(left) + int(right) + carry
        columns.append(f"{left} + {right} + {carry} = {total // 10} {total % 10}")
        carry, digit = divmod(total, 10)
        digits.append(str(digit))
    digits += ["1"] if carry else []
    return Problem(
        "add",
        f"add {' '.join(str(first))} + {' '.join(str(second))}",
        " ".join(reversed(digits)),
        " ".join(digits),
        " ; ".join(columns),
        f"{min(first, second)}+{max(first, second)}",
    )


def chain_problem(rng: random.Random, level: float) -> Problem:
    """Numbered steps of + - * on one digit, modulo 10."""
    count = between(rng, 2, 6, level) if level < 1 else rng.randint(4, 6)
    value = rng.randrange(10)
    question, medium, high = [f"chain {value}"], [], []
    for step in STEPS[:count]:
        sign, operand = rng.choice("+-*"), rng.randrange(2, 10)
        before = value
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        question.append(f"{step} {sign} {operand}")
        medium.append(f"{step} {value}")
        high.append(f"{step} {before} {sign} {operand} = {value}")
    text = " ".join(question)
    return Problem("chain", text, str(value), " ".join(medium), " ".join(high), text)


def sort_problem(rng: random.Random, level: float) -> Problem:
    """Distinct letters into alphabetical order: insertion sort, or two sorted halves."""
    count = between(rng, 3, 8, level) if level < 1 else rng.randint(6, 8)
    letters = rng.sample(LETTERS, count)
    prefixes = [f"{letter} : {' '.join(sorted(letters[: done + 1]))}" for done, letter in enumerate(letters)]
    half = (count + 1) // 2
    medium = f"{' '.join(sorted(letters[:half]))} ; {' '.join(sorted(letters[half:]))}"
    answer = " ".join(sorted(letters))
    return Problem("sort", f"sort {' '.join(letters)}", answer, medium, " ; ".join(prefixes), answer)


def logic_problem(rng: random.Random, level: float) -> Problem:
    """Numbered steps of and, or, xor (some negated) on variables with given values, from left to right."""
    count = between(rng, 2, 7, level) if level < 1 else rng.randint(5, 7)
    names = rng.sample(LETTERS, 4)
    values = {name: rng.random() < 0.5 for name in names}
    start = rng.choice(names)
    value = values[start]
    question = [f"logic {' '.join(f'{name} {word(values[name])}' for name in names)} ; {start}"]
    medium, high = [word(value)], [f"{start} {word(value)}"]
    for step in STEPS[:count]:
        sign, negated, name = rng.choice(("and", "or", "xor", "xor")), rng.random() < 0.3, rng.choice(names)
        operand = values[name] != negated
        before = value
        value = {"and": value and operand, "or": value or operand, "xor": value != operand}[sign]
        text = f"{sign} {'not ' if negated else ''}{name}"
        question.append(f"{step} {text}")
        medium.append(f"{step} {word(value)}")
        high.append(f"{step} {word(before)} {text} {word(values[name])} = {word(value)}")
    joined = " ".join(question)
    return Problem("logic", joined, word(value), " ".join(medium), " ".join(high), joined)


def word(value: bool) -> str:
    """The word for a truth value."""
    return "true" if value else "false"


@dataclass(frozen=True)
class FarContext:
    """Facts `> key value` scattered in filler, with where each key stands (token offset in the context)."""

    family: str
    text: str
    links: dict[str, str]
    offsets: dict[str, int]
    length: int


def scatter(
    rng: random.Random, facts: Sequence[tuple[str, str]], length: int
) -> tuple[str, list[tuple[int, str, str]]]:
    """Place the facts (key, value) in random order at random places among filler words, `length` tokens in all.

    Returns the text and (token offset, key, value) of every fact in the order of the text.
    """
    order = list(facts)
    rng.shuffle(order)
    gaps = sorted(rng.randint(0, max(0, length - 3 * len(order))) for _ in order)
    tokens: list[str] = []
    placed = []
    for index, (key, value) in enumerate(order):
        fill = gaps[index] - (gaps[index - 1] if index else 0)
        tokens += rng.choices(FILLER, k=fill)
        placed.append((len(tokens), key, value))
        tokens += [">", key, value]
    tokens += rng.choices(FILLER, k=max(0, length - len(tokens)))
    return " ".join(tokens), placed


def context_of(rng: random.Random, family: str, links: dict[str, str], length: int) -> FarContext:
    """The facts scattered over a text."""
    text, placed = scatter(rng, list(links.items()), length)
    return FarContext(family, text, links, {key: offset for offset, key, _ in placed}, len(text.split()))


def retrieve_context(rng: random.Random, length: int, num_facts: int) -> FarContext:
    """Independent facts: no name is both a key and a value."""
    names = rng.sample(NAMES, 2 * num_facts)
    return context_of(rng, "retrieve", dict(zip(names[:num_facts], names[num_facts:], strict=True)), length)


def hops_context(rng: random.Random, length: int, num_facts: int) -> FarContext:
    """Facts that form paths of four links, so that every hop has one next name."""
    num_paths = max(1, num_facts // 4)
    names = rng.sample(NAMES, 5 * num_paths)
    links = {names[5 * path + i]: names[5 * path + i + 1] for path in range(num_paths) for i in range(4)}
    return context_of(rng, "hops", links, length)


def far_context(rng: random.Random, family: str, length: int, num_facts: int) -> FarContext:
    """A context of either far family."""
    return {"retrieve": retrieve_context, "hops": hops_context}[family](rng, length, num_facts)


def retrieve_question(context: FarContext, keys: Sequence[str]) -> Problem:
    """Ask for the value of one or more keys (the test split asks for one)."""
    values = [context.links[key] for key in keys]
    pairs = " ".join(f"> {key} {value}" for key, value in zip(keys, values, strict=True))
    answer = " ".join(values)
    return Problem("retrieve", f"find {' '.join(keys)}", answer, answer, pairs, context.text)


def path_from(context: FarContext, start: str, hops: int) -> list[str] | None:
    """The names on the path from start, or None when it ends early."""
    path = [start]
    for _ in range(hops):
        if path[-1] not in context.links:
            return None
        path.append(context.links[path[-1]])
    return path


def hops_question(context: FarContext, path: Sequence[str]) -> Problem:
    """Ask for the last name of a path; the trace counts the hops down."""
    hops = len(path) - 1
    medium = " ".join(f"{hops - i} {path[i + 1]}" for i in range(hops))
    high = " ".join(f"{hops - i} > {path[i]} {path[i + 1]}" for i in range(hops))
    return Problem("hops", f"from {path[0]} hops {hops}", path[-1], medium, high, context.text)


def far_question(rng: random.Random, context: FarContext, before: int, practice: bool) -> Problem | None:
    """A question whose facts all start before this token offset, or None; the test asks for one key at a time."""
    num_keys = rng.choice((1, 1, 2, 4)) if practice else 1
    early = [key for key, offset in context.offsets.items() if offset < before]
    if context.family == "retrieve":
        return retrieve_question(context, rng.sample(early, min(num_keys, len(early)))) if early else None
    path = path_from(context, rng.choice(early), rng.randint(2, 4)) if early else None
    if path is None or any(context.offsets[key] >= before for key in path[:-1]):
        return None
    return hops_question(context, path)


MAKERS: dict[str, Callable[[random.Random, float], Problem]] = {
    "add": add_problem,
    "chain": chain_problem,
    "sort": sort_problem,
    "logic": logic_problem,
}


def short_problem(rng: random.Random, family: str, level: float) -> Problem:
    """A problem of one of the short families."""
    return MAKERS[family](rng, level)


SUITE = Suite(
    name="tiny_reasoner",
    short=SHORT_FAMILIES,
    far=FAR_FAMILIES,
    make_short=short_problem,
    make_context=far_context,
    make_question=far_question,
    num_facts=(16, 24),
    loss_share={"low": 0.11, "medium": 0.22, "high": 0.67},
    config=reasoner_config,
)

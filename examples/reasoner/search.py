"""Families that search: `subset`, `path`, `solve`. High effort tries branches in random order, with dead ends.

Medium effort writes the branch that leads to the answer and no other: it has to see it at once.
"""

import random
from collections.abc import Sequence
from itertools import combinations, pairwise

from examples.reasoner.problem import Problem, Step, other_digit, size, spell, write_step
from examples.tiny_reasoner.trace import Trace
from examples.tiny_reasoner.vocabulary import LETTERS


def subsets_with_sum(numbers: Sequence[int], target: int) -> list[tuple[int, ...]]:
    """All subsets of these numbers, each in the order given, that sum to the target."""
    return [
        chosen for count in range(1, len(numbers) + 1) for chosen in combinations(numbers, count)
        if sum(chosen) == target
    ]  # fmt: skip


def subset_problem(rng: random.Random, level: float) -> Problem:
    """Which of these numbers sum to the target; exactly one subset does."""
    count = size(rng, 3, 5, level, 1)
    while True:
        numbers = rng.sample(range(3, 50), count)
        target = sum(rng.sample(numbers, rng.randint(2, max(2, count - 2))))
        solutions = subsets_with_sum(numbers, target)
        if len(solutions) == 1:
            break

    def work(rng: random.Random) -> Trace:
        trace = Trace()
        find_subset(rng, trace, numbers, target)
        return trace

    chosen = solutions[0]
    lefts = [target - sum(chosen[: place + 1]) for place in range(len(chosen))]
    medium = " ; ".join(f"take {spell(each)} left {spell(left)}" for each, left in zip(chosen, lefts, strict=True))
    listed = " , ".join(map(spell, numbers))
    identity = f"{sorted(numbers)} {target}"
    return Problem(
        "subset", f"subset {listed} = {spell(target)}", " + ".join(map(spell, chosen)), identity, medium, work
    )


def find_subset(rng: random.Random, trace: Trace, numbers: Sequence[int], left: int) -> bool:
    """Write the search among these numbers for a sum of `left`, depth first; whether it was found.

    If what is left is one of the numbers it is taken; otherwise smaller ones are, in random order, each with those
    after it.
    """
    if left in numbers:
        trace.write(f"take {spell(left)} left 0")
        return True
    smaller = [place for place, number in enumerate(numbers) if number < left]
    for place in rng.sample(smaller, len(smaller)):
        number = numbers[place]
        trace.write("take").write(spell(number), "free")
        result = spell(left - number)
        proof = f"{spell(number)} + {result} = {spell(left)}"
        write_step(rng, trace, Step("left", result, proof, other_digit(result)))
        trace.write(";", "free")
        if find_subset(rng, trace, numbers[place + 1 :], left - number):
            return True
        trace.write(f"back {spell(left)} ;")
    return False


def path_problem(rng: random.Random, level: float) -> Problem:
    """The way through a directed graph with dead ends; exactly one leads to the goal."""
    length, num_dead = size(rng, 2, 4, level, 2), size(rng, 1, 8, level, 2)
    names = rng.sample(LETTERS, length + 1 + num_dead)
    path, dead = names[: length + 1], names[length + 1 :]
    edges = set(pairwise(path))
    for place, name in enumerate(dead):
        parents = [*path[:-1], *dead[:place]]
        edges |= {(rng.choice(parents), name) for _ in range(rng.choice((1, 1, 2)))}
    listed = rng.sample(sorted(edges), len(edges))

    def work(rng: random.Random) -> Trace:
        trace = Trace()
        find_path(rng, trace, listed, path[0], path[-1], {path[0]})
        return trace

    ends = f"{path[0]} to {path[-1]}"
    question = f"path {ends} : {' , '.join(f'{start} {end}' for start, end in listed)}"
    identity = f"{ends} {sorted(edges)}"
    return Problem("path", question, " ".join(path), identity, " ".join(reversed(path)), work)


def find_path(
    rng: random.Random, trace: Trace, edges: Sequence[tuple[str, str]], node: str, goal: str, seen: set[str]
) -> bool:
    """Write the search from this node, depth first; whether it was found.

    `k : b c` lists where an edge leads from k to what was not seen; `k : dead` that there is nothing. After a dead end
    the node before it is written again.
    """
    while True:
        ahead = [end for start, end in edges if start == node and end not in seen]
        trace.write(f"{node} : {' '.join(ahead) or 'dead'} ;")
        if goal in ahead:
            trace.write(goal)
            return True
        if not ahead:
            return False
        child = rng.choice(ahead)
        seen.add(child)
        branch = Trace()
        found = find_path(rng, branch, edges, child, goal, seen)
        first, *others = branch.words
        trace.write(first[0], "free" if len(ahead) > 1 else "sure").words.extend(others)
        if found:
            return True


def digit_solutions(first: int, second: int, total: int) -> list[tuple[int, int]]:
    """All digits x, y of 1 to 9 with first * x + second * y = total."""
    return [(x, y) for x in range(1, 10) for y in range(1, 10) if first * x + second * y == total]


def solve_problem(rng: random.Random, level: float) -> Problem:
    """Two digits that fulfil a x + b y = c; exactly one pair does. High effort tries x in random order."""
    while True:
        most = round(9 + 16 * level)
        first, second = rng.sample(range(3, most + 1), 2)
        total = first * rng.randint(1, 9) + second * rng.randint(1, 9)
        solutions = digit_solutions(first, second, total)
        if len(solutions) == 1:
            break
    x, y = solutions[0]

    def work(rng: random.Random) -> Trace:
        trace = Trace()
        possible = [digit for digit in range(1, 10) if first * digit < total]
        order = rng.sample(possible, len(possible))
        for tried in order[: order.index(x)]:
            try_digit(rng, trace, first, tried, total)
            trace.write("no ;")
        try_digit(rng, trace, first, x, total)
        return trace.write(f"y {y}")

    left = total - first * x
    question = f"solve {spell(first)} x + {spell(second)} y = {spell(total)}"
    identity = f"{sorted((first, second))} {total}"
    medium = f"x {x} = {spell(first * x)} left {spell(left)} y {y}"
    return Problem("solve", question, f"x {x} y {y}", identity, medium, work)


def try_digit(rng: random.Random, trace: Trace, factor: int, digit: int, total: int) -> None:
    """Write what is left of the total when x is this digit: `x 4 = 2 8 left 5 5`."""
    trace.write("x").write(str(digit), "free")
    product = spell(factor * digit)
    write_step(rng, trace, Step("=", product, f"{digit} * {spell(factor)} = {product}", other_digit(product)))
    trace.write("left", "free").write(spell(total - factor * digit))

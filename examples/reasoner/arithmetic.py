"""Families that follow a procedure, whose steps can be checked: `add`, `mul`, `chain`, `logic`, `sort`, `compare`."""

import random
from itertools import zip_longest

from examples.reasoner.problem import Problem, Step, other_digit, size, spell, write_step, write_steps
from examples.tiny_reasoner.trace import Trace
from examples.tiny_reasoner.vocabulary import LETTERS, STEPS


def column_steps(first: int, second: int) -> list[Step]:
    """Addition of two numbers column by column, from the right: `7 + 5 + 1 = 1 3`."""
    steps, carry = [], 0
    for left, right in zip_longest(reversed(str(first)), reversed(str(second)), fillvalue="0"):
        total = int(left) + int(right) + carry
        result = spell(total, 2)
        work, proof = f"{left} + {right} + {carry} =", f"{right} + {left} + {carry} = {result}"
        steps.append(Step(work, result, proof, other_digit(result)))
        carry = total // 10
    return steps


def add_problem(rng: random.Random, level: float) -> Problem:
    """Two numbers of the same width; medium effort writes the digits from the right."""
    width = size(rng, 2, 6, level, 2)
    first, second = (rng.randrange(10 ** (width - 1), 10**width) for _ in range(2))
    total = str(first + second)
    return Problem(
        family="add",
        question=f"add {spell(first)} + {spell(second)}",
        answer=" ".join(total),
        identity=f"{min(first, second)}+{max(first, second)}",
        medium=" ".join(reversed(total)),
        work=lambda rng: write_steps(rng, column_steps(first, second)),
    )


def product_steps(number: int, digit: int) -> list[Step]:
    """A number times one digit, from the right, then the product: `7 * 8 + 0 = 5 6`."""
    steps, carry = [], 0
    for each in reversed(str(number)):
        total = int(each) * digit + carry
        result = spell(total, 2)
        proof = f"{digit} * {each} + {carry} = {result}"
        steps.append(Step(f"{each} * {digit} + {carry} =", result, proof, other_digit(result)))
        carry = total // 10
    product = spell(number * digit)
    return [*steps, Step(f"* {digit} =", product, f"= {product}", other_digit(product))]


def mul_problem(rng: random.Random, level: float) -> Problem:
    """Two or three digits times one or two; medium effort writes the partial products."""
    width = size(rng, 2, 3, level, 1)
    first = rng.randrange(10 ** (width - 1), 10**width)
    second = rng.randrange(11, 100) if rng.random() < level else rng.randrange(2, 10)
    digits = [int(digit) for digit in reversed(str(second))]

    def work(rng: random.Random) -> Trace:
        steps = [step for digit in digits for step in product_steps(first, digit)]
        if len(digits) > 1:
            steps += column_steps(first * digits[0], 10 * first * digits[1])
        return write_steps(rng, steps)

    return Problem(
        family="mul",
        question=f"mul {spell(first)} * {spell(second)}",
        answer=spell(first * second),
        identity=f"{min(first, second)}*{max(first, second)}",
        medium=" + ".join(spell(first * digit * 10**place) for place, digit in enumerate(digits)),
        work=work,
    )


def chain_problem(rng: random.Random, level: float) -> Problem:
    """Numbered steps of + - * on numbers below 100, modulo 100; medium effort notes every second value."""
    value = rng.randrange(100)
    question, steps, values = [f"chain {spell(value, 2)}"], [], []
    for label in STEPS[: size(rng, 2, 8, level, 2)]:
        sign, operand = rng.choice("+-*"), rng.randrange(2, 10)
        before = spell(value, 2)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 100
        result = spell(value, 2)
        question.append(f"{label} {sign} {operand}")
        other = f"- {operand} + {before}" if sign == "-" else f"{operand} {sign} {before}"
        steps.append(Step(f"{label} {before} {sign} {operand} =", result, f"{other} = {result}", other_digit(result)))
        values.append(f"{label} {result}")
    text = " ".join(question)
    medium = " ".join(every_second(values))
    return Problem("chain", text, spell(value, 2), text, medium, lambda rng: write_steps(rng, steps))


def every_second(values: list[str]) -> list[str]:
    """The second, the fourth and so on, and the last."""
    return [*values[1:-1:2], values[-1]]


def word(value: bool) -> str:
    """The word for a truth value."""
    return "true" if value else "false"


def logic_problem(rng: random.Random, level: float) -> Problem:
    """Numbered steps of and, or, xor, from left to right, on variables with given values; medium as in `chain`."""
    names = rng.sample(LETTERS, 5)
    given = {name: rng.random() < 0.5 for name in names}
    start = rng.choice(names)
    value = given[start]
    question = [f"logic {' '.join(f'{name} {word(given[name])}' for name in names)} ; {start}"]
    steps = [Step(start, word(value), f"{start} {word(value)}", lambda _, value=value: word(not value))]
    values = []
    for label in STEPS[: size(rng, 2, 8, level, 2)]:
        sign, negation, name = rng.choice(("and", "or", "xor", "xor")), rng.choice(("", "", "not ")), rng.choice(names)
        operand, before = given[name] != bool(negation), word(value)
        value = {"and": value and operand, "or": value or operand, "xor": value != operand}[sign]
        question.append(f"{label} {sign} {negation}{name}")
        work = f"{label} {before} {sign} {negation}{name} {word(given[name])} ="
        proof = f"{negation}{word(given[name])} {sign} {before} = {word(value)}"
        steps.append(Step(work, word(value), proof, lambda _, value=value: word(not value)))
        values.append(f"{label} {word(value)}")
    text = " ".join(question)
    medium = " ".join(every_second(values))
    return Problem("logic", text, word(value), text, medium, lambda rng: write_steps(rng, steps))


def sort_problem(rng: random.Random, level: float) -> Problem:
    """Distinct letters into alphabetical order; high effort inserts them one by one, in an order drawn at random."""
    letters = rng.sample(LETTERS, size(rng, 3, 11, level, 2))
    half = (len(letters) + 1) // 2
    answer = " ".join(sorted(letters))

    def work(rng: random.Random) -> Trace:
        trace, order = Trace(), rng.sample(letters, len(letters))
        for count, letter in enumerate(order, 1):
            trace.write(letter, "free")
            result = " ".join(sorted(order[:count]))
            write_step(rng, trace, Step(":", result, result, lambda rng, result=result: other_place(rng, result)))
            if count < len(order):
                trace.write(";", "free")
        return trace

    medium = f"{' '.join(sorted(letters[:half]))} ; {' '.join(sorted(letters[half:]))}"
    return Problem("sort", f"sort {' '.join(letters)}", answer, answer, medium, work)


def other_place(rng: random.Random, text: str) -> str:
    """The same letters with two neighbours exchanged; a single letter becomes another one."""
    letters = text.split()
    if len(letters) == 1:
        return rng.choice([letter for letter in LETTERS if letter != letters[0]])
    place = rng.randrange(len(letters) - 1)
    letters[place : place + 2] = reversed(letters[place : place + 2])
    return " ".join(letters)


def compare_problem(rng: random.Random, level: float) -> Problem:
    """The largest of some numbers that begin alike; each is compared with the largest before it."""
    count, width = size(rng, 2, 6, level, 2), size(rng, 2, 4, level, 1)
    base = rng.randrange(10 ** (width - 1), 10**width)
    numbers: list[int] = []
    while len(numbers) < count:
        unit = 10 ** rng.randint(1, width - 1)
        number = base - base % unit + rng.randrange(unit)
        if number not in numbers:
            numbers.append(number)
    largest = [max(numbers[: place + 1]) for place in range(count)]
    steps = []
    for before, number, after in zip(largest, numbers[1:], largest[1:], strict=False):
        first, second, result, other = map(spell, (before, number, after, min(before, number)))
        steps.append(
            Step(f"{first} , {second} :", result, f"{second} , {first} : {result}", lambda _, other=other: other)
        )
    return Problem(
        family="compare",
        question=f"compare {' , '.join(map(spell, numbers))}",
        answer=spell(largest[-1]),
        identity=str(sorted(numbers)),
        medium=" , ".join(map(spell, largest[1:])),
        work=lambda rng: write_steps(rng, steps),
    )

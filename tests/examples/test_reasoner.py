"""The reasoner: its analyses followed step by step, its splits and data, and how both examples train."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

from examples.reasoner import record
from examples.reasoner.datasets import PLAN
from examples.reasoner.far import MOST, drawn
from examples.reasoner.problem import MOST_WORDS
from examples.reasoner.tasks import SUITE
from examples.tiny_reasoner import datasets, tasks, train
from examples.tiny_reasoner.model import reasoner_config
from examples.tiny_reasoner.rows import Curriculum, far_rows, short_rows
from examples.tiny_reasoner.suite import EFFORTS, FAR_TOKENS, Problem, Suite
from examples.tiny_reasoner.tokenizer import IDS, build_tokenizer, render_turns
from moesaic.data.verifiers import exact_match
from tests.closeness import assert_near

EXAMPLE = Path(record.__file__).parent
DATA = EXAMPLE / "data"
Statement = Callable[[str], bool]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problems(family: str, count: int = 25) -> list[Problem]:
    rng = random.Random(11)
    return [SUITE.draw_problem(rng, family, "train") for _ in range(count)]


def joined(text: str) -> str:
    """Digits that stand side by side are one number: `1 2 + 3` is `12 + 3`."""
    return re.sub(r"\b0+(?=\d)", "", re.sub(r"(?<=\d) (?=\d)", "", text))


def equation(text: str, modulo: int = 10**9) -> bool:
    left, right = joined(text).split(" = ")
    return eval(left) % modulo == int(right)


def settled(segment: str, holds: Statement) -> str:
    """The statement that a step ends with. Wrong ones are found wrong, right ones found right, every proof holds."""
    statement, *checks = segment.split(" check ")
    for check in checks:
        proof, verdict, redone = re.fullmatch(r"(.+?) (ok|no redo) ?(.*)", check).groups()
        assert holds(proof), (segment, proof)
        assert holds(statement) == (verdict == "ok"), segment
        statement = redone or statement
    assert holds(statement), segment
    return statement


def columns(segments: list[str], first: int, second: int) -> str:
    """The sum that addition column by column gives, its operands and carries compared with the numbers."""
    digits, carry = "", 0
    width = max(len(str(first)), len(str(second)))
    pairs = zip(reversed(str(first).zfill(width)), reversed(str(second).zfill(width)), strict=True)
    for segment, (left, right) in zip(segments, pairs, strict=True):
        statement = settled(segment, equation)
        assert statement.startswith(f"{left} + {right} + {carry} = ")
        *_, tens, ones = statement.split()
        carry, digits = int(tens), ones + digits
    return f"{carry or ''}{digits}"


def follow_add(problem: Problem, text: str) -> str:
    first, second = joined(problem.question.removeprefix("add ")).split(" + ")
    return " ".join(columns(text.split(" ; "), int(first), int(second)))


def follow_mul(problem: Problem, text: str) -> str:
    first, second = joined(problem.question.removeprefix("mul ")).split(" * ")
    segments, products = text.split(" ; "), []
    for digit in reversed(second):
        carry = 0
        for each in reversed(first):
            statement = settled(segments.pop(0), equation)
            assert statement.startswith(f"{each} * {digit} + {carry} = ")
            carry = int(statement.split()[-2])

        def is_product(said: str, digit: str = digit) -> bool:
            return int(said.split("=")[1].replace(" ", "")) == int(first) * int(digit)

        products.append(settled(segments.pop(0), is_product).split("= ")[1].replace(" ", ""))
    if len(products) == 1:
        return " ".join(products[0])
    return " ".join(columns(segments, int(products[0]), 10 * int(products[1])))


def follow_chain(problem: Problem, text: str) -> str:
    start, *asked = re.split(r" (?=\d\. )", problem.question.removeprefix("chain "))
    value = start
    for segment, step in zip(text.split(" ; "), asked, strict=True):
        label, work = step.split(" ", 1)
        statement = settled(segment, lambda said: equation(re.sub(r"^\d\. ", "", said), 100))
        assert statement.startswith(f"{label} {value} {work} = ")
        value = statement.split(" = ")[1]
    return value


def follow_logic(problem: Problem, text: str) -> str:
    given, work = problem.question.removeprefix("logic ").split(" ; ")
    names = given.split()
    values = dict(zip(names[::2], names[1::2], strict=True))
    start, *asked = re.split(r" (?=\d\. )", work)
    first, *segments = text.split(" ; ")

    def holds(said: str) -> bool:
        said = re.sub(r"^\d\. ", "", said)
        said = re.sub(r"\b([a-z]) (true|false)", lambda m: m[2] if values[m[1]] == m[2] else "wrong", said)
        left, right = said.split(" = ")
        before, sign, after = re.fullmatch(r"((?:not )?\w+) (and|or|xor) ((?:not )?\w+)", left).groups()
        sides = [eval(side.title().replace("Not", "not")) for side in (before, after)]
        return {"and": all(sides), "or": any(sides), "xor": sides[0] != sides[1]}[sign] == (right == "true")

    value = settled(first, lambda said: said == f"{start} {values[start]}").split()[1]
    for segment, step in zip(segments, asked, strict=True):
        label, work = step.split(" ", 1)
        statement = settled(segment, holds)
        assert statement.startswith(f"{label} {value} {work} ")
        value = statement.split(" = ")[1]
    return value


def follow_sort(problem: Problem, text: str) -> str:
    taken = ""
    for segment in text.split(" ; "):
        taken += segment[0]
        expected = " ".join(sorted(taken))
        settled(segment, lambda said, expected=expected: said.split(" : ")[-1].removeprefix(": ") == expected)
    assert sorted(taken) == sorted(problem.question.split()[1:])
    return expected


def follow_compare(problem: Problem, text: str) -> str:
    def holds(said: str) -> bool:
        numbers = [int(each) for each in re.findall(r"\d+", joined(said))]
        return numbers[2] == max(numbers[:2])

    largest, *others = problem.question.removeprefix("compare ").split(" , ")
    for segment, other in zip(text.split(" ; "), others, strict=True):
        statement = settled(segment, holds)
        assert statement.startswith(f"{largest} , {other} : ")
        largest = statement.split(" : ")[1]
    return largest


def follow_subset(problem: Problem, text: str) -> str:
    listed, target = joined(problem.question.removeprefix("subset ")).split(" = ")
    numbers, stack, tried = [int(each) for each in listed.split(" , ")], [], [set()]
    lefts = [int(target)]
    for segment in text.split(" ; "):
        if segment.startswith("back"):
            later = numbers[numbers.index(stack[-1]) + 1 :]
            assert set(later).isdisjoint({lefts[-1]}) and tried.pop() == {each for each in later if each < lefts[-1]}
            lefts.pop()
            stack.pop()
            assert joined(segment) == f"back {lefts[-1]}"
            continue
        number = int(joined(segment).split()[1])
        left = lefts[-1] - number

        def holds(said: str, left: int = left) -> bool:
            return equation(said) if "=" in said else int(joined(said).split()[-1]) == left

        settled(segment, holds)
        assert number not in tried[-1]
        assert not stack or numbers.index(number) > numbers.index(stack[-1])
        tried[-1].add(number)
        tried.append(set())
        stack.append(number)
        lefts.append(left)
    assert lefts[-1] == 0
    return " + ".join(" ".join(str(number)) for number in stack)


def follow_path(problem: Problem, text: str) -> str:
    ends, listed = problem.question.removeprefix("path ").split(" : ")
    edges = [tuple(edge.split()) for edge in listed.split(" , ")]
    start, goal = ends.split(" to ")
    stack, seen = [], set()
    *segments, last = text.split(" ; ")
    for segment in segments:
        node, ahead = segment.split(" : ")
        while stack and node in stack and stack[-1] != node:
            stack.pop()
        if node not in stack:
            assert (node == start) if not stack else (stack[-1], node) in edges
            stack.append(node)
        seen.add(node)
        expected = [end for begin, end in edges if begin == node and end not in seen]
        assert ahead == (" ".join(expected) or "dead")
        assert goal not in expected or segment == segments[-1]
    assert last == goal
    return " ".join([*stack, goal])


def follow_solve(problem: Problem, text: str) -> str:
    first, second, total = map(int, re.findall(r"\d+", joined(problem.question)))
    *failed, found = text.split(" ; ")
    tried = []
    for segment in (*failed, found):
        work, end = segment.split(" left ")
        tried.append(int(work.split()[1]))

        def holds(said: str) -> bool:
            return equation(said) if "*" in said else int(joined(said).split("= ")[1]) == first * tried[-1]

        settled(work, holds)
        left = total - first * tried[-1]
        fits = left % second == 0 and 1 <= left // second <= 9
        assert joined(end) == (f"{left} y {left // second}" if fits else f"{left} no")
        assert fits == (segment is found)
    assert len(set(tried)) == len(tried)
    return f"x {tried[-1]} y {found.split()[-1]}"


def facts_of(problem: Problem) -> tuple[list[tuple[str, str]], str]:
    context, asked = problem.question.rsplit(" ; ", 1)
    return re.findall(r"> (\w+) (\w+)", context), asked


def found_facts(problem: Problem, text: str) -> list[tuple[str, str]]:
    """The facts that the steps settle on."""
    facts, _ = facts_of(problem)

    def holds(said: str) -> bool:
        first, second = said.split("> ")[1].split()
        return (first, second) in facts

    pairs = [settled(segment, holds).split("> ")[1].split() for segment in text.split(" ; ")]
    return [(first, second) for first, second in pairs]


def follow_retrieve(problem: Problem, text: str) -> str:
    found = found_facts(problem, text)
    assert [key for key, _ in found] == facts_of(problem)[1].split()[1:]
    return " ".join(value for _, value in found)


def follow_hops(problem: Problem, text: str) -> str:
    found = found_facts(problem, text)
    _, start, _, hops = facts_of(problem)[1].split()
    assert [key for key, _ in found] == [start, *(value for _, value in found[:-1])]
    assert len(found) == int(hops)
    return found[-1][1]


def follow_latest(problem: Problem, text: str) -> str:
    found, (facts, asked) = found_facts(problem, text), facts_of(problem)
    assert found == [fact for fact in facts if fact[0] == asked.split()[1]][-1:]
    return found[-1][1]


def follow_total(problem: Problem, text: str) -> str:
    segments = text.split(" ; ")
    found = found_facts(problem, " ; ".join(segment for segment in segments if ">" in segment))
    assert [key for key, _ in found] == facts_of(problem)[1].split()[1:]
    total = int(found[0][1])
    for (_, value), segment in zip(found[1:], segments[2::2], strict=True):
        total += int(value)
        assert joined(settled(segment, equation)).endswith(f"= {total}")
    return " ".join(str(total))


FOLLOW: dict[str, Callable[[Problem, str], str]] = {
    "add": follow_add, "mul": follow_mul, "chain": follow_chain, "logic": follow_logic, "sort": follow_sort,
    "compare": follow_compare, "subset": follow_subset, "path": follow_path, "solve": follow_solve,
    "retrieve": follow_retrieve, "hops": follow_hops, "latest": follow_latest, "total": follow_total,
}  # fmt: skip


def test_there_are_ten_families_and_three_are_far() -> None:
    assert len(SUITE.families) >= 10 and len(SUITE.far) >= 3
    assert FOLLOW.keys() == set(SUITE.families)


@pytest.mark.parametrize("family", SUITE.families)
def test_every_analysis_at_high_effort_ends_in_the_answer(family: str) -> None:
    rng = random.Random(1)
    num_slips = 0
    for problem in problems(family):
        for _ in range(3):
            trace = problem.trace("high", rng)
            assert exact_match(FOLLOW[family](problem, trace.text), problem.answer)
            assert len(trace.words) <= MOST_WORDS
            runs = re.findall(r"s+", "".join("s" if kind == "slip" else "." for _, kind in trace.words))
            assert len(runs) == len(re.findall("no redo", trace.text))
            num_slips += len(runs)
    assert num_slips or family == "path"


@pytest.mark.parametrize("family", SUITE.families)
def test_analyses_of_one_problem_differ_in_length(family: str) -> None:
    rng = random.Random(2)
    varied = [len({len(problem.trace("high", rng).words) for _ in range(12)}) > 1 for problem in problems(family, 8)]
    assert sum(varied) >= 6


@pytest.mark.parametrize("family", SUITE.families)
def test_medium_effort_is_short_and_low_is_silent(family: str) -> None:
    rng = random.Random(3)
    length = Counter[str]()
    for problem in problems(family):
        for effort in EFFORTS:
            length[effort] += len(problem.trace(effort, rng).words)
        assert problem.trace("medium", rng) == problem.trace("medium", rng)
    assert length["low"] == 0 < length["medium"] < length["high"]


def test_puzzles_have_one_solution() -> None:
    for problem in problems("subset"):
        listed, target = joined(problem.question.removeprefix("subset ")).split(" = ")
        numbers = [int(each) for each in listed.split(" , ")]
        sums = Counter(sum(some) for size in range(1, 7) for some in combinations(numbers, size))
        assert sums[int(target)] == 1
    for problem in problems("solve"):
        first, second, total = map(int, re.findall(r"\d+", joined(problem.question)))
        assert sum(first * x + second * y == total for x in range(1, 10) for y in range(1, 10)) == 1
    for problem in problems("path"):
        ends, listed = problem.question.removeprefix("path ").split(" : ")
        start, goal = ends.split(" to ")
        edges = [tuple(edge.split()) for edge in listed.split(" , ")]
        paths, complete = [[start]], []
        while paths:
            path = paths.pop()
            paths += [[*path, end] for begin, end in edges if begin == path[-1] and end not in path]
            complete += [path] if path[-1] == goal else []
        assert len(complete) == 1


def test_far_facts_lie_far() -> None:
    for family in SUITE.far:
        for problem in problems(family):
            context, _ = problem.question.rsplit(" ; ", 1)
            tokens = context.split()
            assert 250 <= len(tokens) <= 400
            places = {tuple(tokens[i + 1 : i + 3]): i for i, token in enumerate(tokens) if token == ">"}
            steps = problem.trace("high", random.Random(4)).text.split(" ; ")
            found = found_facts(problem, " ; ".join(step for step in steps if ">" in step))
            assert all(len(tokens) - places[fact] > FAR_TOKENS for fact in found)


def test_every_context_can_be_asked_about() -> None:
    rng = random.Random(0)
    for _ in range(20_000):  # of 11 facts with one of two keys, one draw in a thousand gives all to one
        assert min(Counter(drawn(rng, ["marble", "linen"], 11)).values()) <= MOST


@pytest.mark.parametrize("family", SUITE.families)
def test_splits_are_disjoint(family: str) -> None:
    rng = random.Random(5)
    seen = {
        split: {SUITE.draw_problem(rng, family, split).identity for _ in range(40)}
        for split in ("train", "calibration", "test")
    }
    assert all(not seen[one] & seen[other] for one, other in combinations(seen, 2))


def test_what_is_injected_is_not_learnt() -> None:
    rng = random.Random(6)
    while True:
        rows = short_rows(rng, Curriculum(SUITE), 512)
        learnt, redone = rows.labels != -100, (rows.ids == IDS["redo"]).nonzero()
        if len(redone):
            break
    silent = sum(turn.stop - turn.start for turn in rows.turns) - int(learnt.sum())
    assert silent >= len(redone)
    assert torch.equal(rows.turn >= 0, learnt) and not bool((rows.sure & ~learnt).any())
    assert all(bool(learnt[row, place - 1]) for row, place in redone)


def test_low_effort_gets_its_share_of_the_learnt_tokens() -> None:
    curriculum, rng = Curriculum(SUITE), random.Random(7)
    for level in (0.2, 1.0):
        curriculum.level = dict.fromkeys(SUITE.families, level)
        for rows in (short_rows(rng, curriculum, 2**13), far_rows(rng, curriculum, 2**15)):
            tokens = Counter[str]()
            for turn in rows.turns:
                tokens[turn.cell[1]] += turn.stop - turn.start
            assert 0.03 <= tokens["low"] / tokens.total() <= 0.08


def small(suite: Suite) -> Suite:
    """The same families with a model of two narrow layers."""
    return replace(suite, config=lambda: reasoner_config(num_layers=2, hidden=64, num_experts=4, top_k=2))


def small_run(suite: Suite, out: Path, stop_at: int | None = None, shards: int = 1, processes: int = 1) -> train.Run:
    recipe = train.Recipe(steps=4, tokens_per_step=1024 * shards, shards=shards, quantize_from=0.7)
    out.mkdir(exist_ok=True)
    return train.Run(recipe, suite, out, "cpu", train.Cadence(log=1, probe=100), stop_at, processes)


def logged_losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("suite", [SUITE, tasks.SUITE], ids=lambda suite: suite.name)
def test_resumed_run_repeats_the_losses(suite: Suite, tmp_path: Path) -> None:
    train.work(0, small_run(small(suite), tmp_path / "whole"))
    for stop_at in (2, None):
        train.work(0, small_run(small(suite), tmp_path / "resumed", stop_at))
    losses = logged_losses(tmp_path / "whole")
    assert len(losses) == 4 and losses == logged_losses(tmp_path / "resumed")


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        run = small_run(small(SUITE), tmp_path / str(processes), stop_at=2, shards=2, processes=processes)
        start_processes(train.work, (run,), nprocs=processes, start_method="fork")
        weights.append(torch.load(run.out / "checkpoint.pt", weights_only=True)["model"])
    for name, value in weights[0].items():
        assert_near(weights[1][name], value, 1e-3, name)


def test_committed_data_is_what_the_code_writes(tmp_path: Path) -> None:
    datasets.write_datasets(PLAN, tmp_path)
    for name in PLAN.seeds:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 3e6


def test_published_problems_are_no_validation_problems() -> None:
    plan = replace(PLAN, num_test=3, num_validation=12)
    taken = {(problem.family, problem.identity) for problem in datasets.validation_problems(plan)}
    published = datasets.published_problems(plan, 12)
    assert len(published) == 12 * len(SUITE.families)
    assert not taken & {(problem.family, problem.identity) for problem in published}


def test_conversations_are_rendered_as_in_training() -> None:
    tokenizer, rng = build_tokenizer(), random.Random(8)
    for family in SUITE.families:
        problem = SUITE.draw_problem(rng, family, "train")
        trace = problem.trace("high", rng)
        row = datasets.conversation("row", "high", [(problem, trace)])
        ids = tokenizer.apply_chat_template(row["messages"], reasoning_effort="high", return_dict=False)
        assert ids == list(render_turns([(problem, trace)], "high").ids)


def test_the_model_has_the_size_that_the_example_promises() -> None:
    config = SUITE.config()
    expert = 3 * config.hidden_size * config.intermediate_size
    assert 7e6 <= config.num_hidden_layers * config.num_local_experts * expert <= 9e6


def test_the_page_says_of_every_bar_what_was_measured_and_which_is_missed() -> None:
    written = json.loads((EXAMPLE / "record.json").read_text())
    page = (EXAMPLE / "README.md").read_text()
    for name, (lowest, highest) in record.BARS.items():
        (row,) = re.findall(rf"^\| `{name}`.*$", page, re.MULTILINE)
        measured = written["measured"]["bars"][name]
        assert f"{measured:.2f}" in row
        assert ("**missed**" in row) != (lowest <= measured <= highest), name
    assert 4 <= written["training"]["percent_of_learnt_tokens"]["low"] <= 6

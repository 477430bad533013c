"""The committed problems: `python -m examples.tiny_reasoner.datasets --out DIR` writes the same bytes every time."""

import argparse
import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from examples.tiny_reasoner import tasks
from examples.tiny_reasoner.tasks import EFFORTS, FAMILIES, FAR_FAMILIES, Effort, Problem, Split
from examples.tiny_reasoner.tokenizer import render_turns

SEEDS = {"test": 101, "calibration_short": 102, "calibration_long": 103, "prompts": 104, "validation": 105}
TEST_PER_FAMILY, VALIDATION_PER_FAMILY = 200, 200
PROMPTS_PER_FAMILY = {"add": 4000, "chain": 1000, "sort": 1000, "logic": 1000, "retrieve": 100, "hops": 100}
SHORT_ROWS, SHORT_TOKENS = 256, 256
LONG_ROWS, LONG_TOKENS = 96, (350, 512)
Row = dict[str, object]


def test_rows(rng: random.Random) -> list[Row]:
    """Distinct test problems, the same number of every family."""
    return problem_rows(draw_problems(rng, "test", dict.fromkeys(FAMILIES, TEST_PER_FAMILY)))


def validation_rows(rng: random.Random) -> list[Row]:
    """Problems for choices: as unseen as the test's, and none of them, whichever way it is asked."""
    test = draw_problems(random.Random(SEEDS["test"]), "test", dict.fromkeys(FAMILIES, TEST_PER_FAMILY))
    taken = {(problem.family, problem.identity) for problem in test}
    count = dict.fromkeys(FAMILIES, VALIDATION_PER_FAMILY)
    return problem_rows(draw_problems(rng, "test", count, taken), "validation-")


def prompt_rows(rng: random.Random) -> list[Row]:
    """Distinct problems of the training split, for traces and reinforcement learning."""
    return problem_rows(draw_problems(rng, "train", PROMPTS_PER_FAMILY))


def draw_problems(
    rng: random.Random, split: Split, count: Mapping[str, int], taken: Collection[tuple[str, str]] = ()
) -> list[Problem]:
    """As many distinct problems of every family as `count` says, none of a family and identity in `taken`."""
    problems: list[Problem] = []
    for family in FAMILIES:
        drawn: dict[str, Problem] = {}
        while len(drawn) < count[family]:
            problem = tasks.draw_problem(rng, family, split)
            if (family, problem.identity) not in taken:
                drawn.setdefault(problem.question, problem)
        problems += drawn.values()
    return problems


def problem_rows(problems: Iterable[Problem], prefix: str = "") -> list[Row]:
    """Problems as a test asks them, numbered within their family."""
    rows: list[Row] = []
    numbers = Counter[str]()
    for problem in problems:
        name = f"{prefix}{problem.family}-{numbers[problem.family]:03d}"
        numbers[problem.family] += 1
        prompt = [{"role": "user", "content": problem.question}]
        question: Row = {"id": name, "task": problem.family, "prompt": prompt}
        rows.append(question | {"answer": problem.answer, "verifier": "exact_match"})
    return rows


def conversation(name: str, effort: Effort, problems: list[Problem]) -> Row:
    """Problems as one chat with worked answers; `thinking` is empty at low effort."""
    messages = []
    for problem in problems:
        messages.append({"role": "user", "content": problem.question})
        messages.append({"role": "assistant", "thinking": problem.thinking(effort), "content": problem.answer})
    return {"id": name, "task": problems[0].family, "effort": effort, "messages": messages}


def far_turns(
    rng: random.Random,
    family: str,
    split: Split,
    context_tokens: tuple[int, int],
    num_facts: tuple[int, int],
    turns: int,
) -> list[Problem]:
    """Several questions about one context, the first carrying it."""
    context = tasks.split_context(rng, family, split, rng.randint(*context_tokens), rng.randint(*num_facts))
    problems: list[Problem] = []
    while len(problems) < turns:
        problem = tasks.far_question(rng, context, context.length)
        if problem is not None:
            problems.append(problem if problems else tasks.with_context(context, problem))
    return problems


def fitting(problems: list[Problem], effort: Effort, most: int) -> list[Problem]:
    """The longest run of turns, from the first, that renders within `most` tokens."""
    while len(render_turns(problems, effort).ids) > most:
        problems = problems[:-1]
    return problems


def calibration_short_rows(rng: random.Random) -> list[Row]:
    """All families and efforts in turn, one to four problems a row."""
    rows = []
    for index in range(SHORT_ROWS):
        family, effort = FAMILIES[index % 6], EFFORTS[index // 6 % 3]
        turns = rng.randint(1, 4)
        if family in FAR_FAMILIES:
            problems = far_turns(rng, family, "calibration", (60, 140), (6, 12), turns)
        else:
            problems = [tasks.short_problem(rng, family, "calibration") for _ in range(turns)]
        rows.append(conversation(f"short-{index:03d}", effort, fitting(problems, effort, SHORT_TOKENS)))
    return rows


def calibration_long_rows(rng: random.Random) -> list[Row]:
    """Far families: a context of 250 to 400 tokens and as many questions as fit."""
    rows: list[Row] = []
    while len(rows) < LONG_ROWS:
        family, effort = FAR_FAMILIES[len(rows) % 2], EFFORTS[len(rows) // 2 % 3]
        problems = far_turns(rng, family, "calibration", (250, 400), (16, 24), 12)
        problems = fitting(problems, effort, rng.randint(*LONG_TOKENS))
        if problems and len(render_turns(problems, effort).ids) >= LONG_TOKENS[0]:
            rows.append(conversation(f"long-{len(rows):03d}", effort, problems))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_datasets(out: Path) -> None:
    """One file for every name of `SEEDS`."""
    out.mkdir(parents=True, exist_ok=True)
    makers = {
        "test": test_rows,
        "validation": validation_rows,
        "calibration_short": calibration_short_rows,
        "calibration_long": calibration_long_rows,
        "prompts": prompt_rows,
    }
    for name, make in makers.items():
        write_rows(out / f"{name}.jsonl", make(random.Random(SEEDS[name])))


def main() -> None:
    """Write the data files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    write_datasets(parser.parse_args().out)


if __name__ == "__main__":
    main()

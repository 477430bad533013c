"""The committed problems: `python -m examples.tiny_reasoner.datasets --out DIR` writes the same bytes every time."""

import argparse
import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_reasoner.suite import EFFORTS, Effort, Problem, Split, Suite
from examples.tiny_reasoner.tasks import SUITE
from examples.tiny_reasoner.tokenizer import render_turns
from examples.tiny_reasoner.trace import Trace

SHORT_ROWS, SHORT_TOKENS = 256, 256
LONG_ROWS, LONG_TOKENS = 96, (350, 512)
Row = dict[str, object]
Turns = list[tuple[Problem, Trace]]


@dataclass(frozen=True)
class Plan:
    """What is written of a suite, and the seed of each file."""

    suite: Suite
    seeds: Mapping[str, int]
    num_test: int
    """Of each family, as in the next."""
    num_validation: int
    num_prompts: Mapping[str, int]


PLAN = Plan(
    SUITE,
    seeds={"test": 101, "calibration_short": 102, "calibration_long": 103, "prompts": 104, "validation": 105},
    num_test=200,
    num_validation=200,
    num_prompts={"add": 4000, "chain": 1000, "sort": 1000, "logic": 1000, "retrieve": 100, "hops": 100},
)


def test_problems(plan: Plan) -> list[Problem]:
    """Distinct test problems, the same number of every family."""
    count = dict.fromkeys(plan.suite.families, plan.num_test)
    return draw_problems(random.Random(plan.seeds["test"]), plan.suite, "test", count)


def validation_problems(plan: Plan) -> list[Problem]:
    """Problems for choices: as unseen as the test's, and none of them, whichever way it is asked."""
    taken = {(problem.family, problem.identity) for problem in test_problems(plan)}
    count = dict.fromkeys(plan.suite.families, plan.num_validation)
    return draw_problems(random.Random(plan.seeds["validation"]), plan.suite, "test", count, taken)


def published_problems(plan: Plan, count: int) -> list[Problem]:
    """Test problems for a published record, opened once: none of them was used for a choice."""
    taken = {(problem.family, problem.identity) for problem in validation_problems(plan)}
    rng = random.Random(f"published {plan.seeds['test']}")
    return draw_problems(rng, plan.suite, "test", dict.fromkeys(plan.suite.families, count), taken)


def prompt_problems(plan: Plan) -> list[Problem]:
    """Distinct problems of the training split, for traces and reinforcement learning."""
    return draw_problems(random.Random(plan.seeds["prompts"]), plan.suite, "train", plan.num_prompts)


def draw_problems(
    rng: random.Random,
    suite: Suite,
    split: Split,
    count: Mapping[str, int],
    taken: Collection[tuple[str, str]] = (),
) -> list[Problem]:
    """As many distinct problems of every family as `count` says, none of a family and identity in `taken`."""
    problems: list[Problem] = []
    for family in suite.families:
        drawn: dict[str, Problem] = {}
        while len(drawn) < count[family]:
            problem = suite.draw_problem(rng, family, split)
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


def conversation(name: str, effort: Effort, turns: Turns) -> Row:
    """Problems as one chat with worked answers; `thinking` is empty at low effort."""
    messages = []
    for problem, trace in turns:
        messages.append({"role": "user", "content": problem.question})
        messages.append({"role": "assistant", "thinking": trace.text, "content": problem.answer})
    return {"id": name, "task": turns[0][0].family, "effort": effort, "messages": messages}


def far_problems(
    rng: random.Random,
    suite: Suite,
    family: str,
    context_tokens: tuple[int, int],
    num_facts: tuple[int, int],
    turns: int,
) -> list[Problem]:
    """Several questions about one context of the calibration split, the first carrying it."""
    context = suite.split_context(rng, family, "calibration", rng.randint(*context_tokens), rng.randint(*num_facts))
    problems: list[Problem] = []
    while len(problems) < turns:
        problem = suite.make_question(rng, context, context.length, False)
        if problem is not None:
            problems.append(problem if problems else problem.after(context.text))
    return problems


def worked(rng: random.Random, problems: Iterable[Problem], effort: Effort, most: int) -> Turns:
    """Problems with a trace each: as many, from the first, as render within `most` tokens."""
    turns: Turns = [(problem, problem.trace(effort, rng)) for problem in problems]
    while len(render_turns(turns, effort).ids) > most:
        turns = turns[:-1]
    return turns


def calibration_short_rows(plan: Plan) -> list[Row]:
    """All families and efforts in turn, one to four problems a row."""
    rng, suite = random.Random(plan.seeds["calibration_short"]), plan.suite
    rows = []
    for index in range(SHORT_ROWS):
        family = suite.families[index % len(suite.families)]
        effort = EFFORTS[index // len(suite.families) % 3]
        count = rng.randint(1, 4)
        if family in suite.far:
            problems = far_problems(rng, suite, family, (60, 140), (6, 12), count)
        else:
            problems = [suite.short_problem(rng, family, "calibration") for _ in range(count)]
        rows.append(conversation(f"short-{index:03d}", effort, worked(rng, problems, effort, SHORT_TOKENS)))
    return rows


def calibration_long_rows(plan: Plan) -> list[Row]:
    """Far families: a context of 250 to 400 tokens and as many questions as fit."""
    rng, suite = random.Random(plan.seeds["calibration_long"]), plan.suite
    rows: list[Row] = []
    while len(rows) < LONG_ROWS:
        family, effort = suite.far[len(rows) % len(suite.far)], EFFORTS[len(rows) // len(suite.far) % 3]
        problems = far_problems(rng, suite, family, (250, 400), suite.num_facts, 12)
        turns = worked(rng, problems, effort, rng.randint(*LONG_TOKENS))
        if turns and len(render_turns(turns, effort).ids) >= LONG_TOKENS[0]:
            rows.append(conversation(f"long-{len(rows):03d}", effort, turns))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_datasets(plan: Plan, out: Path) -> None:
    """One file for every name of the plan's seeds."""
    out.mkdir(parents=True, exist_ok=True)
    rows = {
        "test": problem_rows(test_problems(plan)),
        "validation": problem_rows(validation_problems(plan), "validation-"),
        "calibration_short": calibration_short_rows(plan),
        "calibration_long": calibration_long_rows(plan),
        "prompts": problem_rows(prompt_problems(plan)),
    }
    for name, each in rows.items():
        write_rows(out / f"{name}.jsonl", each)


def main(plan: Plan = PLAN, out: Path = Path(__file__).parent / "data") -> None:
    """Write the data files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--published", type=int, help="write so many test problems of each family, and no other file")
    arguments = parser.parse_args()
    if arguments.published:
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows = problem_rows(published_problems(plan, arguments.published), "published-")
        write_rows(arguments.out / "published.jsonl", rows)
    else:
        write_datasets(plan, arguments.out)


if __name__ == "__main__":
    main()

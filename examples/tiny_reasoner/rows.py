"""Training rows: many questions in one row, of sizes and families that follow what the model still gets wrong."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.tiny_reasoner import tasks
from examples.tiny_reasoner.tasks import EFFORTS, FAMILIES, FAR_FAMILIES, SHORT_FAMILIES, Effort, Problem
from examples.tiny_reasoner.tokenizer import PAD_ID, Rendered, render_answer, render_question, render_system
from examples.tiny_reasoner.vocabulary import DIGITS, LETTERS, NAMES, STEPS

SHORT_ROW = 256
EFFORT_WEIGHT: dict[Effort, float] = {"high": 0.5, "medium": 0.3, "low": 0.2}
ECHO_WORDS = (*NAMES, *LETTERS, *DIGITS, *STEPS)
Cell = tuple[str, Effort]


@dataclass(frozen=True)
class Turn:
    """One answer inside a row: which cell it belongs to and where its tokens lie."""

    cell: Cell
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """Rows of conversations, each tensor [batch, token].

    labels are -100 where the assistant did not write, turn is the answer a token belongs to, documents number the
    conversations of a row (they do not see each other) and positions count from each one's start.
    """

    ids: Tensor
    labels: Tensor
    turn: Tensor
    documents: Tensor
    positions: Tensor
    turns: tuple[Turn, ...]

    def to(self, device: str) -> "Rows":
        """The same rows on another device."""
        tensors = (self.ids, self.labels, self.turn, self.documents, self.positions)
        return Rows(*(tensor.to(device) for tensor in tensors), self.turns)

    @property
    def single(self) -> bool:
        """Whether every row holds one conversation, so that plain causal attention is right."""
        return bool((self.documents == 0).all())


@dataclass
class Curriculum:
    """What has been measured so far (running exact-answer error per cell) and the level it has opened per family."""

    error: dict[Cell, float] = field(default_factory=lambda: {(f, e): 1.0 for f in FAMILIES for e in EFFORTS})
    level: dict[str, float] = field(default_factory=lambda: {f: 0.0 if f in FAR_FAMILIES else 0.2 for f in FAMILIES})
    since: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 0))

    def observe(self, results: Iterable[tuple[Cell, bool]]) -> None:
        """Fold fresh answers in (training rows are never repeated, so they measure honestly)."""
        for cell, exact in results:
            if cell[0] == "echo":
                continue
            self.error[cell] += 0.01 * (float(not exact) - self.error[cell])

    def advance(self, progress: float, threshold: float, step_size: float) -> None:
        """Open the next level where the high effort is mostly right, and everywhere as the run goes on."""
        for family in FAMILIES:
            self.since[family] += 1
            ready = self.error[family, "high"] < threshold and self.since[family] >= 20
            if ready and self.level[family] < 1.0:
                self.level[family] = min(1.0, self.level[family] + step_size)
                self.since[family] = 0
            self.level[family] = max(self.level[family], min(1.0, (progress - 0.1) / 0.4))

    def weight(self, cell: Cell) -> float:
        """Sampling weight: the effort's share, more where it errs; low effort cannot earn more by failing."""
        error = 0.35 if cell[1] == "low" else self.error[cell]
        return EFFORT_WEIGHT[cell[1]] * (0.15 + error)

    def draw(self, rng: random.Random, families: tuple[str, ...]) -> Cell:
        """A family and effort by weight."""
        cells: list[Cell] = [(family, effort) for family in families for effort in EFFORTS]
        return rng.choices(cells, [self.weight(cell) for cell in cells])[0]

    def far_share(self) -> float:
        """The part of each step's tokens spent on the far families."""
        far, short = (self._mean_error(families) for families in (FAR_FAMILIES, SHORT_FAMILIES))
        return min(0.65, max(0.35, 0.5 + 0.5 * (far - short)))

    def _mean_error(self, families: tuple[str, ...]) -> float:
        errors = [self.error[family, effort] for family in families for effort in ("medium", "high")]
        return sum(errors) / len(errors)


class RowWriter:
    """Collects rendered turns row by row."""

    def __init__(self, num_rows: int, length: int) -> None:
        self.ids = torch.full((num_rows, length), PAD_ID, dtype=torch.long)
        self.labels = torch.full((num_rows, length), -100, dtype=torch.long)
        self.turn = torch.full((num_rows, length), -1, dtype=torch.long)
        self.documents = torch.zeros((num_rows, length), dtype=torch.long)
        self.positions = torch.arange(length).repeat(num_rows, 1)
        self.turns: list[Turn] = []
        self.row, self.used = 0, 0

    def room(self) -> int:
        """Tokens left in this row."""
        return self.ids.shape[1] - self.used

    def next_row(self) -> None:
        """Go on at the start of the next row."""
        self.row, self.used = self.row + 1, 0

    def next_document(self) -> None:
        """What follows in this row does not see what came before."""
        if self.used:
            self.documents[self.row, self.used :] += 1
            self.positions[self.row, self.used :] = torch.arange(self.room())

    def write(self, part: Rendered, cell: Cell | None = None) -> None:
        """Append one part; with a cell it is an answer, whose tokens are predicted from the one before."""
        start, stop = self.used, self.used + len(part.ids)
        self.ids[self.row, start:stop] = torch.tensor(part.ids)
        if cell is not None:
            self.labels[self.row, start - 1 : stop - 1] = self.ids[self.row, start:stop]
            self.turn[self.row, start - 1 : stop - 1] = len(self.turns)
            self.turns.append(Turn(cell, self.row, start, stop))
        self.used = stop

    def rows(self) -> Rows:
        """What has been written."""
        return Rows(self.ids, self.labels, self.turn, self.documents, self.positions, tuple(self.turns))


def write_turn(writer: RowWriter, problem: Problem, effort: Effort, prefix: Rendered | None) -> bool:
    """Write question and answer (after a system message if given) when they fit; say whether they did."""
    question, answer = render_question(problem.question), render_answer(problem, effort)
    opening = question if prefix is None else prefix + question
    if len(opening.ids) + len(answer.ids) > writer.room():
        return False
    writer.write(opening)
    writer.write(answer, (problem.family, effort))
    return True


def sampled_level(rng: random.Random, level: float) -> float:
    """Mostly the current level, sometimes an easier one, so that early skills stay."""
    return level if rng.random() < 0.6 else rng.uniform(0.0, level)


def short_rows(rng: random.Random, curriculum: Curriculum, num_rows: int) -> Rows:
    """Rows full of single problems, each its own conversation as in the test, up to the first that does not fit."""
    writer = RowWriter(num_rows, SHORT_ROW)
    for row in range(num_rows):
        fits = True
        while fits:
            family, effort = curriculum.draw(rng, SHORT_FAMILIES)
            problem = tasks.short_problem(rng, family, "train", sampled_level(rng, curriculum.level[family]))
            writer.next_document()
            fits = write_turn(writer, problem, effort, render_system(effort))
        if row + 1 < num_rows:
            writer.next_row()
    return writer.rows()


def echo_rows(rng: random.Random, num_tokens: int) -> Rows:
    """A warm-up exercise, not a task: repeat a list of words, which teaches to find a word and read on from there."""
    length = 128
    writer = RowWriter(num_tokens // length, length)
    for row in range(num_tokens // length):
        fits = True
        while fits:
            text = " ".join(rng.sample(ECHO_WORDS, rng.randint(4, 40)))
            problem = Problem("echo", text, text, text, text, text)
            writer.next_document()
            fits = write_turn(writer, problem, "low", render_system("low"))
        if row + 1 < num_tokens // length:
            writer.next_row()
    return writer.rows()


def far_sizes(level: float) -> tuple[int, int, int]:
    """Row length, longest context and most facts at this level."""
    context = 24 + round(376 * level)
    row = next(size for size, most in ((128, 62), (256, 160), (512, 400)) if context <= most)
    return row, context, 4 + round(20 * level)


def far_rows(rng: random.Random, curriculum: Curriculum, num_tokens: int) -> Rows:
    """One context a row, then questions until the row is full; all rows at one level, so that they share a length."""
    level = sampled_level(rng, min(curriculum.level[family] for family in FAR_FAMILIES))
    length, longest, most_facts = far_sizes(level)
    num_rows = num_tokens // length
    writer = RowWriter(num_rows, length)
    for row in range(num_rows):
        family, effort = curriculum.draw(rng, FAR_FAMILIES)
        num_facts = rng.randint(max(4, most_facts - 8), most_facts)
        context = tasks.split_context(rng, family, "train", rng.randint(longest * 5 // 8, longest), num_facts)
        write_far_row(rng, writer, context, effort)
        if row + 1 < num_rows:
            writer.next_row()
    return writer.rows()


def write_far_row(rng: random.Random, writer: RowWriter, context: tasks.FarContext, effort: Effort) -> None:
    """Questions about one context, the first one carrying it."""
    first = True
    while True:
        problem = tasks.far_question(rng, context, context.length, rng.choice((1, 1, 2, 4)))
        if problem is None:
            continue
        asked = tasks.with_context(context, problem) if first else problem
        if not write_turn(writer, asked, effort, render_system(effort) if first else None):
            return
        first = False

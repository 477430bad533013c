"""Training rows: many questions in one row, of sizes and families that follow what the model still gets wrong."""

import random
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.tiny_reasoner.suite import EFFORTS, Context, Effort, Suite
from examples.tiny_reasoner.tokenizer import PAD_ID, Rendered, render_answer, render_question, render_system
from examples.tiny_reasoner.trace import Trace
from examples.tiny_reasoner.vocabulary import DIGITS, LETTERS, NAMES, STEPS

SHORT_ROW = 256
ECHO_WORDS = (*NAMES, *LETTERS, *DIGITS, *STEPS)
Cell = tuple[str, Effort]


@dataclass(frozen=True)
class Result:
    """One answer under teacher forcing: whether every word that follows from what was before it came first."""

    cell: Cell
    exact: bool
    loss: float
    tokens: int
    """How many words of it were learnt."""


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

    labels are -100 where nothing is learnt, sure says which labels follow from what stands before them, turn is the
    answer a token belongs to, documents number the conversations of a row (they do not see each other) and positions
    count from each one's start.
    """

    ids: Tensor
    labels: Tensor
    sure: Tensor
    turn: Tensor
    documents: Tensor
    positions: Tensor
    turns: tuple[Turn, ...]

    def to(self, device: str) -> "Rows":
        """The same rows on another device."""
        tensors = (self.ids, self.labels, self.sure, self.turn, self.documents, self.positions)
        return Rows(*(tensor.to(device) for tensor in tensors), self.turns)

    @property
    def single(self) -> bool:
        """Whether every row holds one conversation, so that plain causal attention is right."""
        return bool((self.documents == 0).all())


class Shares:
    """Keeps each effort's part of the learnt tokens at what the suite asks for."""

    def __init__(self, share: dict[Effort, float], tokens: dict[Effort, int] | None = None) -> None:
        self.share = share
        self.tokens = tokens or dict.fromkeys(EFFORTS, 0)

    def next(self) -> Effort:
        """The effort that is furthest below its share."""
        total = max(1, sum(self.tokens.values()))
        return max(EFFORTS, key=lambda effort: self.share[effort] - self.tokens[effort] / total)

    def add(self, effort: Effort, tokens: int) -> None:
        """Count what was learnt at this effort."""
        self.tokens[effort] += tokens


class Curriculum:
    """What has been measured so far (running error per family and effort) and the level it has opened per family."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.error: dict[Cell, float] = {(family, effort): 1.0 for family in suite.families for effort in EFFORTS}
        self.level = {family: 0.0 if family in suite.far else 0.2 for family in suite.families}
        self.since = dict.fromkeys(suite.families, 0)
        self.short_shares, self.far_shares = Shares(suite.loss_share), Shares(suite.loss_share)

    def values(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        shares = {"short": self.short_shares.tokens, "far": self.far_shares.tokens}
        return deepcopy({"error": self.error, "level": self.level, "since": self.since, "shares": shares})

    def restore(self, values: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self.error, self.level, self.since = values["error"], values["level"], values["since"]
        self.short_shares.tokens, self.far_shares.tokens = values["shares"]["short"], values["shares"]["far"]

    def observe(self, results: Iterable[Result]) -> None:
        """Fold fresh answers in (training rows are never repeated, so they measure honestly)."""
        for result in results:
            family, effort = result.cell
            if family == "echo":
                continue
            self.error[result.cell] += 0.01 * (float(not result.exact) - self.error[result.cell])
            shares = self.far_shares if family in self.suite.far else self.short_shares
            shares.add(effort, result.tokens)

    def advance(self, progress: float, threshold: float, step_size: float) -> None:
        """Open the next level where the high effort is mostly right, and everywhere as the run goes on."""
        for family in self.suite.families:
            self.since[family] += 1
            ready = self.error[family, "high"] < threshold and self.since[family] >= 20
            if ready and self.level[family] < 1.0:
                self.level[family] = min(1.0, self.level[family] + step_size)
                self.since[family] = 0
            self.level[family] = max(self.level[family], min(1.0, (progress - 0.1) / 0.4))

    def draw_family(self, rng: random.Random, families: Sequence[str], effort: Effort) -> str:
        """A family, more often where it errs at times: what is always wrong at an effort may be out of its reach."""
        errors = [self.error[family, effort] for family in families]
        return rng.choices(families, [0.2 + 2 * error * (1 - error) for error in errors])[0]

    def far_share(self) -> float:
        """The part of each step's tokens spent on the far families."""
        far, short = (self._mean_error(families) for families in (self.suite.far, self.suite.short))
        return min(0.65, max(0.35, 0.5 + 0.5 * (far - short)))

    def _mean_error(self, families: tuple[str, ...]) -> float:
        errors = [self.error[family, effort] for family in families for effort in ("medium", "high")]
        return sum(errors) / len(errors)


class RowWriter:
    """Collects rendered turns row by row."""

    def __init__(self, num_rows: int, length: int) -> None:
        self.ids = torch.full((num_rows, length), PAD_ID, dtype=torch.long)
        self.labels = torch.full((num_rows, length), -100, dtype=torch.long)
        self.sure = torch.zeros((num_rows, length), dtype=torch.bool)
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
        """Append one part; with a cell it is an answer, whose tokens are predicted from the one before.

        Raises:
            ValueError: if the row has no room for it.
        """
        if len(part.ids) > self.room():
            raise ValueError(f"{len(part.ids)} tokens do not fit the {self.room()} that are left of the row")
        start, stop = self.used, self.used + len(part.ids)
        self.ids[self.row, start:stop] = torch.tensor(part.ids)
        if cell is not None:
            learnt = torch.tensor([kind != "slip" for kind in part.kinds])
            before = slice(start - 1, stop - 1)
            self.labels[self.row, before] = self.ids[self.row, start:stop].where(learnt, -100)
            self.sure[self.row, before] = torch.tensor([kind == "sure" for kind in part.kinds])
            self.turn[self.row, before] = torch.full((len(learnt),), len(self.turns)).where(learnt, -1)
            self.turns.append(Turn(cell, self.row, start, stop))
        self.used = stop

    def rows(self) -> Rows:
        """What has been written."""
        return Rows(self.ids, self.labels, self.sure, self.turn, self.documents, self.positions, tuple(self.turns))


@dataclass(frozen=True)
class Exchange:
    """One question, with all that stands before the answer, and the answer."""

    cell: Cell
    asked: Rendered
    answer: Rendered

    def __len__(self) -> int:
        return len(self.asked.ids) + len(self.answer.ids)

    def write(self, writer: RowWriter) -> None:
        """Append it to the writer's row."""
        writer.write(self.asked)
        writer.write(self.answer, self.cell)


def exchange(cell: Cell, question: str, answer: str, trace: Trace, opens: bool = True) -> Exchange:
    """Render one question and its answer; the first of a conversation opens with the system message."""
    asked = render_question(question)
    return Exchange(cell, render_system(cell[1]) + asked if opens else asked, render_answer(answer, trace))


def packed(exchanges: Iterable[Exchange], length: int) -> Rows:
    """Conversations of one exchange each, longest first, into as few rows as first fit finds."""
    rows: list[list[Exchange]] = []
    room: list[int] = []
    for item in sorted(exchanges, key=len, reverse=True):
        place = next((row for row, left in enumerate(room) if left >= len(item)), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(item)
        room[place] -= len(item)
    writer = RowWriter(len(rows), length)
    for row, items in enumerate(rows):
        if row:
            writer.next_row()
        for item in items:
            writer.next_document()
            item.write(writer)
    return writer.rows()


def sampled_level(rng: random.Random, level: float) -> float:
    """Mostly the current level, sometimes an easier one, so that early skills stay."""
    return level if rng.random() < 0.6 else rng.uniform(0.0, level)


def short_rows(rng: random.Random, curriculum: Curriculum, num_tokens: int) -> Rows:
    """Single problems, each its own conversation as in the test."""
    suite, shares = curriculum.suite, deepcopy(curriculum.short_shares)
    exchanges: list[Exchange] = []
    while sum(map(len, exchanges)) < num_tokens:
        effort = shares.next()
        family = curriculum.draw_family(rng, suite.short, effort)
        problem = suite.short_problem(rng, family, "train", sampled_level(rng, curriculum.level[family]))
        item = exchange((family, effort), problem.question, problem.answer, problem.trace(effort, rng))
        shares.add(effort, len(item.answer.ids))
        exchanges.append(item)
    return packed(exchanges, SHORT_ROW)


def echo_rows(rng: random.Random, num_tokens: int) -> Rows:
    """A warm-up exercise, not a task: repeat a list of words, which teaches to find a word and read on from there."""
    exchanges: list[Exchange] = []
    while sum(map(len, exchanges)) < num_tokens:
        text = " ".join(rng.sample(ECHO_WORDS, rng.randint(4, 40)))
        exchanges.append(exchange(("echo", "low"), text, text, Trace()))
    return packed(exchanges, 128)


def far_sizes(level: float, most_facts: int) -> tuple[int, int, int]:
    """Row length, longest context and most facts at this level."""
    context = 24 + round(376 * level)
    row = next(size for size, most in ((128, 62), (256, 160), (512, 400)) if context <= most)
    return row, context, 4 + round((most_facts - 4) * level)


def far_rows(rng: random.Random, curriculum: Curriculum, num_tokens: int) -> Rows:
    """One context a row, then questions until the row is full; all rows at one level, so that they share a length."""
    suite, shares = curriculum.suite, deepcopy(curriculum.far_shares)
    level = sampled_level(rng, min(curriculum.level[family] for family in suite.far))
    length, longest, most_facts = far_sizes(level, suite.num_facts[1])
    writer = RowWriter(num_tokens // length, length)
    for row in range(num_tokens // length):
        if row:
            writer.next_row()
        effort = shares.next()
        family = curriculum.draw_family(rng, suite.far, effort)
        num_facts = rng.randint(max(4, most_facts - 8), most_facts)
        context = suite.split_context(rng, family, "train", rng.randint(longest * 5 // 8, longest), num_facts)
        shares.add(effort, write_far_row(rng, writer, suite, context, effort))
    return writer.rows()


def write_far_row(rng: random.Random, writer: RowWriter, suite: Suite, context: Context, effort: Effort) -> int:
    """Questions about one context, the first one carrying it; the number of tokens of their answers."""
    tokens = 0
    while True:
        problem = suite.make_question(rng, context, context.length, True)
        if problem is None:
            continue
        asked = problem if tokens else problem.after(context.text)
        cell = (problem.family, effort)
        item = exchange(cell, asked.question, asked.answer, asked.trace(effort, rng), opens=not tokens)
        if len(item) > writer.room():
            return tokens
        item.write(writer)
        tokens += len(item.answer.ids)

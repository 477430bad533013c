"""Prepare the data sets of a run: read the sources, draw, leave out what repeats or gives a test away, count, write.

Tests are drawn first, then the validation split from the same sources, then everything else, from which problems of
both are kept out. Whatever is looked at costs time; so rows are looked at in their drawn order until there are enough.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerFast

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.files import file_digest, written_atomically
from moesaic.core.progress import say
from moesaic.data.calibration import read_conversation, tokenize
from moesaic.data.chat import TemplateError, load_tokenizer
from moesaic.data.datasets import Row
from moesaic.data.prepare.config import CalibrationConfig, PrepareConfig, ProblemsConfig
from moesaic.data.prepare.duplicates import NearDuplicates, TestProblems
from moesaic.data.prepare.layouts import BOXED, LETTER, Made, content_of
from moesaic.data.prepare.pool import Pool, make_pool
from moesaic.data.prepare.reading import Found, find_source
from moesaic.data.problems import read_problem, render_prompt
from moesaic.data.sets import FILES

SUMMARY = "summary.json"
"""The file with what was counted, beside the sets."""
VALIDATION = "validation.jsonl"
"""The file of the validation split, beside those of :data:`moesaic.data.sets.FILES`."""
_WHOLE = 2**31
_PROMPT_EFFORT: Effort = "high"
"""The effort at which the tokens of prompts are counted; efforts differ by a word of the template."""


@dataclass
class Counted:
    """What became of the rows of one set."""

    rows: int = 0
    """Written."""
    tokens: list[int] = field(default_factory=list)
    """Of each row, in the model's chat template."""
    reply_tokens: int = 0
    """Of the assistant, in conversations."""
    sources: Counter[str] = field(default_factory=Counter)
    """Rows written, by source."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows looked at and not taken, by reason."""

    def summary(self) -> dict[str, Any]:
        """As the summary has it."""
        lengths = {"mean": fmean(self.tokens), "longest": max(self.tokens)} if self.tokens else {}
        return vars(self) | {"tokens": {"total": sum(self.tokens), **lengths}}


def prepare(config: PrepareConfig, model: Path, files: Mapping[str, Path], output: Path) -> dict[str, Counted]:
    """Write the data sets into the new directory ``output``; what a killed run had read is not read again.

    Args:
        config: what to prepare.
        model: the checkpoint whose tokenizer and chat template count.
        files: local files or folders by the names that the config gives them.
        output: it appears when it is whole.

    Returns:
        The counts of each set, by name.

    Raises:
        ConfigError: if files are missing that the config names.
        ArtifactError: if a source is not as its layout says, or too little of it can be used.
        StageError: if a source cannot be fetched.
    """
    if output.exists():
        raise ArtifactError(f"{output} exists already; choose another output or remove it")
    _check_files(config, files)
    tokenizer = load_tokenizer(model)
    scratch = output.with_name(f".{output.name}.pools")
    scratch.mkdir(parents=True, exist_ok=True)
    pools, origins = _pools(config, files, scratch)
    with written_atomically(output) as partial:
        partial.mkdir()
        counts = _write_sets(config, pools, tokenizer, partial)
        summary = {
            "config": config.model_dump(mode="json"),
            "tokenizer": file_digest(model / "tokenizer.json"),
            "sources": origins,
            "sets": {name: counted.summary() for name, counted in counts.items()},
            "files": {path.name: file_digest(path) for path in sorted(partial.iterdir())},
        }
        (partial / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(scratch)
    return counts


def _check_files(config: PrepareConfig, files: Mapping[str, Path]) -> None:
    """Raise ConfigError unless the files that are given are those that the config names, before anything is fetched."""
    named = {source.local for name in FILES for source in getattr(config, name).sources if source.local is not None}
    if missing := sorted(named - set(files)):
        raise ConfigError(f"the config names the files {missing[0]!r}; give them: --files {missing[0]}=PATH")
    if unused := sorted(set(files) - named):
        raise ConfigError(
            f"--files {unused[0]}={files[unused[0]]}: the config names only {', '.join(sorted(named)) or 'none'}"
        )


def _pools(
    config: PrepareConfig, files: Mapping[str, Path], scratch: Path
) -> tuple[dict[str, list[Pool]], list[dict[str, Any]]]:
    """The pools of each set, and what the summary says of the sources."""
    found: dict[str, Found] = {}
    pools: dict[str, list[Pool]] = {}
    origins: dict[str, dict[str, Any]] = {}
    for name in FILES:
        makes = "conversation" if name.startswith("calibration") else "problem"
        for source in getattr(config, name).sources:
            key = source.to_json()
            if key not in found:
                found[key] = find_source(source, files)
            pool = make_pool(found[key], makes, config.seed, scratch)
            pools.setdefault(name, []).append(pool)
            said = {"name": source.name, **found[key].origin, "read": pool.num_read, "left_out": pool.left_out}
            if key not in origins:
                origins[key] = said
                say(f"{source.name}: {pool.num_read:,} rows read, {sum(pool.left_out.values()):,} of them not usable")
    return pools, list(origins.values())


def _write_sets(
    config: PrepareConfig, pools: Mapping[str, list[Pool]], tokenizer: PreTrainedTokenizerFast, directory: Path
) -> dict[str, Counted]:
    draw = _Draw(config, tokenizer)
    tests = draw.problems(config.tests, pools["tests"])
    counts = {"tests": _write(tests, config.tests.rows, directory / FILES["tests"])}
    if config.validation_rows:
        counts["validation"] = _write(tests, config.validation_rows, directory / VALIDATION)
    draw.keep_out(content_of(row) for name in counts for row in _read(directory / _file(name)))
    prompts = draw.problems(config.prompts, pools["prompts"])
    counts["prompts"] = _write(prompts, config.prompts.rows, directory / FILES["prompts"])
    for name in ("calibration_short", "calibration_long"):
        wanted: CalibrationConfig = getattr(config, name)
        counts[name] = _write(draw.conversations(wanted, pools[name]), wanted.rows, directory / FILES[name])
    for name, counted in counts.items():
        if not counted.rows:
            left_out = sum(
                (Counter(pool.left_out) for pool in pools["tests" if name == "validation" else name]), Counter[str]()
            )
            reasons = dict(counted.dropped + left_out) or "there is none"
            raise ArtifactError(f"{name}: no row of its sources can be used: {reasons}")
    return counts


def _file(name: str) -> str:
    return FILES.get(name, VALIDATION)


def _read(path: Path) -> Iterator[Made]:
    with path.open() as lines:
        yield from map(json.loads, lines)


@dataclass
class _Drawing:
    """The rows of a set, in the order in which they are drawn, and the counts so far."""

    rows: Iterator[tuple[str, Made, int, int]]
    """Source, row, tokens, tokens of the assistant."""
    dropped: Counter[str]


def _write(drawing: _Drawing, wanted: int, path: Path) -> Counted:
    """Write the next rows of a drawing; counts are of this file alone."""
    counted = Counted()
    before = drawing.dropped.copy()
    with path.open("w") as file:
        while counted.rows < wanted and (drawn := next(drawing.rows, None)) is not None:
            source, row, num_tokens, num_reply = drawn
            file.write(json.dumps(row) + "\n")
            counted.rows += 1
            counted.tokens.append(num_tokens)
            counted.reply_tokens += num_reply
            counted.sources[source] += 1
    counted.dropped = drawing.dropped - before
    return counted


class _Draw:
    """Draws rows of sets that must not repeat themselves, one another, or the tests."""

    def __init__(self, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._tests, self._like_tests = TestProblems([]), NearDuplicates(config.near)
        self._ids: set[str] = set()

    def keep_out(self, problems: Iterator[Sequence[Mapping[str, Any]]]) -> None:
        """From now on draw nothing that holds one of these problems."""
        asked = [_asked(messages) for messages in problems]
        self._tests = TestProblems(asked)
        for texts in asked:
            self._like_tests.add(self._like_tests.signature("\n".join(texts)))

    def problems(self, config: ProblemsConfig, pools: Sequence[Pool]) -> _Drawing:
        """Draw problems."""

        def measure(row: Made, key: int) -> tuple[Made, int, int] | str:
            num_tokens = len(render_prompt(read_problem(Row(row, row["id"])), self._tokenizer, _PROMPT_EFFORT))
            return "longer than max_tokens" if num_tokens > config.max_tokens else (self._named(row), num_tokens, 0)

        return self._draw(pools, measure)

    def conversations(self, config: CalibrationConfig, pools: Sequence[Pool]) -> _Drawing:
        """Draw conversations."""

        def measure(row: Made, key: int) -> tuple[Made, int, int] | str:
            if config.efforts and not row.get("effort") and not row.get("reasoning_effort"):
                row = row | {"effort": config.efforts[key % len(config.efforts)]}
            read = tokenize(self._tokenizer, read_conversation(Row(row, row["id"])), _WHOLE)
            num_tokens, num_reply = len(read.token_ids), sum(read.is_response)
            if not config.min_tokens <= num_tokens <= config.max_tokens:
                return "shorter than min_tokens" if num_tokens < config.min_tokens else "longer than max_tokens"
            return (self._named(row), num_tokens, num_reply) if num_reply else "no reply of the assistant"

        return self._draw(pools, measure)

    def _draw(self, pools: Sequence[Pool], measure: Callable[[Made, int], tuple[Made, int, int] | str]) -> _Drawing:
        dropped: Counter[str] = Counter()
        near, seen = NearDuplicates(self._config.near), set[int]()

        def rows() -> Iterator[tuple[str, Made, int, int]]:
            for source, key, row in _in_turns(pools):
                if key in seen:
                    dropped["the same as another row"] += 1
                    continue
                seen.add(key)
                if reason := self._refuses(row):
                    dropped[reason] += 1
                    continue
                signature = near.signature("\n".join(_asked(content_of(row))))
                if self._like_tests.has_like(signature):
                    dropped["holds a problem of the tests"] += 1
                    continue
                if near.has_like(signature):
                    dropped["nearly the same as another row"] += 1
                    continue
                measured = self._measured(measure, row, key)
                if isinstance(measured, str):
                    dropped[measured] += 1
                    continue
                near.add(signature)
                yield source, *measured

        return _Drawing(rows(), dropped)

    def _refuses(self, row: Made) -> str | None:
        texts = [str(message.get(key) or "") for message in content_of(row) for key in ("content", "thinking")]
        return "holds a problem of the tests" if self._tests.are_in(texts) else None

    @staticmethod
    def _measured(
        measure: Callable[[Made, int], tuple[Made, int, int] | str], row: Made, key: int
    ) -> tuple[Made, int, int] | str:
        try:
            return measure(row, key)
        except TemplateError:
            return "the chat template refuses it"

    def _named(self, row: Made) -> Made:
        """The row under an id that no other row has."""
        name, number = row["id"], 1
        while name in self._ids:
            number += 1
            name = f"{row['id']}-{number}"
        self._ids.add(name)
        return row | {"id": name}


def _in_turns(pools: Sequence[Pool]) -> Iterator[tuple[str, int, Made]]:
    """A row of each pool, then the next of each; one that has no more is passed over."""
    running = [(pool.name, pool.rows()) for pool in pools]
    while running:
        for turn in list(running):
            name, rows = turn
            if (drawn := next(rows, None)) is None:
                running.remove(turn)
            else:
                yield name, *drawn


def _asked(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a user asks, without the words that a layout adds."""
    asked = [str(message.get("content") or "") for message in messages if message["role"] == "user"]
    return [text.removesuffix(BOXED).removesuffix(LETTER) for text in asked]

"""Stages one after the other: what is made again and what is kept, and that a killed one goes on."""

from pathlib import Path

import pytest

from moesaic.core.config import Config
from moesaic.core.errors import StageError
from moesaic.core.stage import Stage, artifact
from moesaic.core.workbench import Workbench


class CountConfig(Config):
    """How far to count."""

    limit: int = 3


class Counter:
    """A stage that counts in its scratch directory and fails once at a number."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.runs, self._fail_at = 0, fail_at

    def run(self, config: CountConfig, *, words: Path, output: Path, scratch: Path) -> dict[str, float]:
        self.runs += 1
        note = scratch / "reached"
        begun = int(note.read_text()) if note.is_file() else 0
        for number in range(begun, config.limit):
            if number == self._fail_at:
                self._fail_at = None
                raise StageError("killed")
            note.write_text(str(number + 1))
        (output / "result.txt").write_text(f"{words.read_text()} from {begun} to {config.limit}")
        return {}


def stage_of(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(Stage, "run", property(lambda self: counter.run))
    return Stage(
        name="count",
        config=CountConfig,
        runtime="search",
        inputs=(artifact("words", "text"),),
        outputs=(artifact("result", "text"),),
    )


def test_a_task_is_made_again_only_if_something_it_is_made_from_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, words = Counter(), tmp_path / "words.txt"
    stage = stage_of(counter, monkeypatch)
    words.write_text("count")

    def result(limit: int = 3, task: str = "") -> str:
        made = Workbench(tmp_path / "run").run(stage, CountConfig(limit=limit), task, words=words)
        return (made / "result.txt").read_text()

    assert [result(), result()] == ["count from 0 to 3"] * 2
    assert counter.runs == 1
    assert result(4) == "count from 0 to 4"
    words.write_text("count anew")
    assert result(4) == "count anew from 0 to 4"
    assert result(4, "another") == "count anew from 0 to 4"
    assert counter.runs == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".work", "another", "count"]


def test_a_killed_stage_leaves_no_output_and_goes_on_from_its_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("count")
    stage, bench = stage_of(Counter(fail_at=2), monkeypatch), Workbench(tmp_path / "run")
    with pytest.raises(StageError, match="killed"):
        bench.run(stage, CountConfig(), words=tmp_path / "words.txt")
    assert not (tmp_path / "run" / "count").exists()
    made = Workbench(tmp_path / "run").run(stage, CountConfig(), words=tmp_path / "words.txt")
    assert (made / "result.txt").read_text() == "count from 2 to 3"


def test_what_follows_is_made_again_with_what_it_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, words = Counter(), tmp_path / "words.txt"
    stage = stage_of(counter, monkeypatch)
    words.write_text("count")

    def chain(limit: int) -> str:
        bench = Workbench(tmp_path / "run")
        first = bench.run(stage, CountConfig(limit=limit), "first", words=words)
        second = bench.run(stage, CountConfig(), "second", words=first / "result.txt")
        return (second / "result.txt").read_text()

    assert chain(1) == "count from 0 to 1 from 0 to 3"
    assert chain(2) == "count from 0 to 2 from 0 to 3"
    assert counter.runs == 4

"""A published number that no longer holds is named (``benchmarks/again.py``)."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import again
from benchmarks.again import RESULTS, SMALL, compare, newest

BAR = {"what": "ours over theirs", "value": 2.0, "least": 1.5, "most": None, "met": True}


def test_a_bar_that_was_met_must_be_met_again() -> None:
    missed = BAR | {"what": "memory", "met": False}
    published = {"bars": [BAR, missed, BAR | {"what": "gone"}]}
    now = {"bars": [BAR | {"value": 1.4, "met": False}, missed]}
    assert list(compare(published, now)) == [
        ("ours over theirs", 2.0, 1.4, False),
        ("memory", 2.0, 2.0, True),
        ("gone", 2.0, None, False),
    ]


def test_what_was_computed_must_be_the_same() -> None:
    published = {"date": "2026-11-01", "rows": [{"ratio": 1.63, "date": "a"}, {"ratio": 1.22}]}
    same = {"date": "2026-12-01", "rows": [{"ratio": 1.63, "date": "a"}, {"ratio": 1.22}]}
    assert list(compare(published, same)) == [("3 numbers and names", "", "the same", True)]
    other = {"date": "2026-12-01", "rows": [{"ratio": 1.63, "date": "b"}, {"ratio": 1.04, "new": 1}]}
    assert list(compare(published, other)) == [
        ("rows.0.date", "a", "b", False),
        ("rows.1.new", None, 1, False),
        ("rows.1.ratio", 1.22, 1.04, False),
    ]


def test_the_newest_record_counts(tmp_path: Path) -> None:
    for day in ("2026-11-29", "2026-12-01", "2026-11-30"):
        (tmp_path / f"speed_2-core-x86_{day}.json").touch()
    assert newest("speed", tmp_path).name == "speed_2-core-x86_2026-12-01.json"
    assert all(newest(name, RESULTS).is_file() for name in SMALL)


def test_a_benchmark_that_does_not_run_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    works = tmp_path / "works.py"
    works.write_text("import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('{\"ratio\": 2}')")
    for name, script in (("broken", "nowhere.py"), ("working", works)):
        (tmp_path / f"{name}_2-core-x86_2026-12-01.json").write_text(
            json.dumps({"command": f"python {script}", "ratio": 2})
        )
    monkeypatch.setattr(again, "RESULTS", tmp_path)
    monkeypatch.setattr(again, "SMALL", ("broken", "working"))
    monkeypatch.setattr(sys, "argv", ["again.py"])
    with pytest.raises(SystemExit) as ended:
        again.main()
    assert ended.value.code
    said = capsys.readouterr().out
    assert "NO LONGER RUNS" in said
    assert "the same" in said

"""Reading traces."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.recover.generate_traces.traces import Trace, read_traces

EXAMPLE = Trace("a", "add", "low", (1, 2, 3), (4, 5), True, False, False)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_a_trace_survives_its_line(tmp_path: Path) -> None:
    other = Trace("b", "hops", "high", (1,), (2,), False, True, True)
    path = write(tmp_path / "traces.jsonl", EXAMPLE.to_json(), other.to_json())
    assert read_traces(path) == read_traces(tmp_path) == [EXAMPLE, other]
    assert json.loads(EXAMPLE.to_json()) == {
        "id": "a",
        "task": "add",
        "effort": "low",
        "prompt_ids": [1, 2, 3],
        "reply_ids": [4, 5],
        "correct": True,
        "truncated": False,
        "held_out": False,
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("id", 3, "'id' must be text, found 3"),
        ("effort", "extreme", "'effort' must be one of low, medium, high, found 'extreme'"),
        ("prompt_ids", [], "'prompt_ids' must be a list of token ids"),
        ("reply_ids", [1, -1], "'reply_ids' must be a list of token ids"),
        ("reply_ids", [1, True], "'reply_ids' must be a list of token ids"),
        ("correct", 1, "'correct' must be true or false, found 1"),
        ("truncated", None, "'truncated' must be true or false, found None"),
        ("held_out", True, "the prompt 'a' says otherwise"),
    ],
)
def test_the_line_that_is_not_a_trace_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    good = json.loads(EXAMPLE.to_json())
    path = write(tmp_path / "traces.jsonl", good, good | {key: value})
    with pytest.raises(ArtifactError, match="traces.jsonl, line 2.*" + message):
        read_traces(path)

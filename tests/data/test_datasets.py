"""Rows end at line feeds and nowhere else; what is no JSON lines is told; no other error comes through."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ArtifactError, MoesaicError
from moesaic.data.datasets import read_rows

ROW = b'{"a": 1}\n'


def values_of(content: bytes, path: Path) -> list[Any]:
    path.write_bytes(content)
    return [row.values for row in read_rows(path)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_a_line_feed_ends_a_row(tmp_path: Path, separator: str) -> None:
    row = {"a": f"x{separator}y"} if separator in "\u2028\u2029\x85" else {"a": "x"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    assert values_of(text.encode() * 2, tmp_path / "a.jsonl") == [row, row]


@pytest.mark.parametrize("content", [ROW * 2, b"\xef\xbb\xbf" + ROW * 2, b"\r\n" + ROW.replace(b"\n", b"\r\n") * 2])
def test_line_ends_and_marks_of_other_systems_are_no_part_of_rows(tmp_path: Path, content: bytes) -> None:
    assert values_of(content, tmp_path / "a.jsonl") == [{"a": 1}, {"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", r"a\.jsonl is a Parquet file; a data set is JSON lines"),
        (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"BZh91AY", "is compressed by bzip2"),
        (b"\xfd7zXZ\x00", "is compressed by xz"),
        (b"[\n" + ROW + b"]", "line 1 is not valid JSON: .*; a row is one JSON object on one line"),
        (b"\x28\xb5\x2f\xfd", "is compressed by zstd"),
        ('{"a": 1}\n'.encode("utf-16"), "is text in UTF-16"),
        (ROW + b'{"a": "\xe9"}\n', "line 2 is not UTF-8 text"),
        (ROW + b'{"a": 1, "a": 2}\n', "line 2 is not valid JSON: the key 'a' occurs twice"),
        (ROW + b'{"a": NaN}\n', "line 2 is not valid JSON: NaN is not a number"),
        (ROW + b'{"a": "\\ud800"}\n', "line 2 holds half of a surrogate pair"),
        (ROW + b'{"a": 1} {"b": 2}\n', "line 2 is not valid JSON: Extra data"),
        (ROW + b'{"a": "b', "line 2 is not valid JSON: Unterminated string"),
        (b'[{"a": 1}]', "line 1 must be a JSON object, found list"),
        (b"id,task\n1,add\n", "line 1 is not valid JSON"),
        (b"\x00" * 20, "line 1 is not valid JSON"),
    ],
)
def test_what_is_no_set_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        values_of(content, tmp_path / "a.jsonl")


def test_a_set_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"a\.jsonl"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(ArtifactError, match=r"a\.jsonl cannot be read: No such file"):
        read_rows(tmp_path)

    def locked(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "b.jsonl").write_bytes(ROW)
    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(ArtifactError, match=r"b\.jsonl cannot be read: Permission denied"):
        read_rows(tmp_path / "b.jsonl")


TEXTS = st.text() | st.text("\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e \r\nab", max_size=5)
"""Often with characters at which some end lines."""
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
OBJECTS = st.dictionaries(TEXTS, SCALARS | st.lists(SCALARS, max_size=2), max_size=3)
ENDS = st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\n \t\r\n"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(OBJECTS, ENDS), min_size=1, max_size=4), st.booleans())
def test_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, str]], as_ascii: bool) -> None:
    content = "".join(json.dumps(row, ensure_ascii=as_ascii) + end for row, end in rows)
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    assert values_of(content.encode("utf-8", "surrogatepass"), path) == [row for row, _ in rows]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(OBJECTS, min_size=1, max_size=3), st.integers(0, 60), st.binary(max_size=2), st.integers(0, 2))
def test_any_bytes_are_rows_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], place: int, put: bytes, cut: int
) -> None:
    """Valid rows, some bytes of which are others."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    content = text[:place] + put + text[place + cut :]
    try:
        found = values_of(content, tmp_path_factory.getbasetemp() / "bytes.jsonl")
    except MoesaicError:
        event("refused")
        return
    lines = [line for line in content.decode("utf-8-sig").split("\n") if line.strip(" \t\r")]
    assert found == [json.loads(line.encode()) for line in lines]

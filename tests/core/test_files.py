"""What is written appears whole or not at all, and what a killed run left is not in the way."""

from pathlib import Path

import pytest

from moesaic.core.files import write_text_atomically, written_atomically


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with written_atomically(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_text_atomically(path, "newer")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("result.json", "newer")]


def test_what_fails_half_way_leaves_the_old_file_and_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), written_atomically(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    write_text_atomically(path, "new")
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"]


def test_a_directory_begins_empty_after_a_kill(tmp_path: Path) -> None:
    left = tmp_path / ".converted.partial"
    left.mkdir()
    (left / "half").touch()
    with written_atomically(tmp_path / "converted") as partial:
        assert not partial.exists()
        partial.mkdir()
        (partial / "whole").touch()
    assert [found.name for found in tmp_path.iterdir()] == ["converted"]
    assert [found.name for found in (tmp_path / "converted").iterdir()] == ["whole"]

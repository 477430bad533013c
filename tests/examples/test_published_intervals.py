"""Pages and records: an interval that a reader finds is one that was measured."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INTERVAL = re.compile(r"([+-]?\d+\.\d)(?:\s+points?)?\s+\[([+-]?\d+\.\d),\s+([+-]?\d+\.\d)\]")
"""Points with their interval, as pages write them: ``+7.8 [6.4, 9.1]``."""


def published(content: Any) -> Iterator[tuple[float, float, float]]:
    """Every difference of a record, rounded as on a page; a page may also say by how much the other is ahead."""
    if isinstance(content, list):
        for each in content:
            yield from published(each)
    elif isinstance(content, dict):
        if "low_points" in content:
            points, low, high = (round(content[name], 1) for name in ("points", "low_points", "high_points"))
            yield from ((points, low, high), (-points, -high, -low))
        yield from published(list(content.values()))


@pytest.fixture(scope="module")
def known() -> set[tuple[float, float, float]]:
    return {interval for path in RECORDS for interval in published(json.loads(path.read_text()))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_intervals_of_a_page_are_in_a_record(page: Path, known: set[tuple[float, float, float]]) -> None:
    told = [tuple(float(number) for number in found.groups()) for found in INTERVAL.finditer(page.read_text())]
    assert [each for each in told if each not in known] == []


def test_an_invented_interval_is_found_out(known: set[tuple[float, float, float]]) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(INTERVAL.findall(text)) > 100
    assert (7.7, 1.2, 99.0) not in known

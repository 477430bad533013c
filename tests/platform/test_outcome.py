"""The tables in the terminal, from the report's own summary."""

import io
from typing import Any

from rich.console import Console

from moesaic.measure.report.evidence import read_evidence
from moesaic.measure.report.findings import summarize
from moesaic.measure.report.recovery import read_recovery, summarize_recovery
from moesaic.platform.runs.outcome import outcome_tables
from tests.measure.recovery_inputs import recovery_inputs
from tests.measure.report_inputs import evaluation, inputs


def shown(summary: dict[str, Any]) -> list[list[str]]:
    """The cells of every printed row, at the width of a small terminal."""
    text = io.StringIO()
    Console(file=text, width=80).print(*outcome_tables(summary))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if "│" in line]


def test_without_recovery_the_child_is_the_pruned_one() -> None:
    rows = shown(summarize(read_evidence(**inputs())))
    assert ["accuracy, low effort", "50.0 %", "45.0 %", "-5.0 [-15.0, +5.0]"] in rows
    assert not any(row[0] == "averaged" for row in rows)


def test_with_recovery_every_stage_has_a_row() -> None:
    search = read_evidence(**inputs())
    summary = summarize(search) | {"recovery": summarize_recovery(read_recovery(search, **recovery_inputs()))}
    rows = shown(summary)
    assert ["parent", "50.0  90.0", "10.0 100.0", "1.00x 1.00x"] in rows
    assert ["pruned", "40.0  80.0", "10.0 100.0", "1.50x 1.50x"] in rows
    assert ["averaged", "51.0  90.0", "9.0 75.0", "1.67x 2.00x"] in rows
    assert ["FP8, unit scales", "41.0  86.0", "9.0 75.0", ""] in rows
    assert ["FP8, calibrated", "50.0  90.0", "9.0 75.0", "1.67x 2.00x"] in rows
    assert ["greedy, averaged", "46.0  80.0", "9.0 75.0", "1.78x 2.13x"] in rows
    assert not any("accuracy" in row[0] for row in rows)
    assert ["experts", "8", "6", "0.75x"] in rows
    assert ["experts per token, all layers", "4", "3", "0.75x"] in rows


def test_after_several_rounds_sizes_are_against_the_parent_or_not_shown() -> None:
    """What the last search began from is half as large as the parent."""
    whole = {"evaluation_parent": evaluation("parent", 0.5, 0.9) | {"parameters": 320}}
    search = read_evidence(**(inputs() | whole))
    summary = summarize(search) | {"recovery": summarize_recovery(read_recovery(search, **recovery_inputs()))}
    rows = shown(summary)
    assert ["parameters", "320", "160", "0.50x"] in rows
    assert not any(row[0].startswith("experts") or "MiB" in row[0] for row in rows)

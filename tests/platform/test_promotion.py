"""The gate line by line, and the record of champions under every order of writing; all by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.measure.report.evidence import read_evidence
from moesaic.measure.report.findings import summarize
from moesaic.measure.report.recovery import read_recovery, summarize_recovery
from moesaic.platform.promote.gate import Figures, Provenance, gate_table, is_met, judge, read_figures
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.registry.champions import Move, replay
from tests.measure.recovery_inputs import recovery_inputs
from tests.measure.report_inputs import inputs

CONFIG = PromoteConfig(
    min_retention={"low": 1.0, "high": 0.98}, min_request_efficiency={"high": 1.5}, max_kv_accuracy_loss=0.02
)
FIGURES = Figures({"low": 1.0, "high": 0.98}, {"low": 1.2, "high": 1.5}, 0.02)
COMPLETE = Provenance(known=12, unknown=(), evidence_is_its_own=True)
CHECKED = Verdict(passed=True)


def summary() -> dict[str, Any]:
    evidence = read_evidence(**inputs())
    return summarize(evidence) | {"recovery": summarize_recovery(read_recovery(evidence, **recovery_inputs()))}


def test_figures_of_a_recovered_child() -> None:
    """Accuracies 0.51 of 0.50 and 0.90 of 0.90; 0.50 and 0.90 with FP8, so 0.01 is lost at most."""
    found = read_figures(summary())
    assert found.retention == pytest.approx({"low": 1.02, "high": 1.0})
    assert found.request_efficiency == pytest.approx({"low": 5 / 3, "high": 2})
    assert found.kv_accuracy_loss == pytest.approx(0.01)


def test_what_was_measured_through_a_server_counts() -> None:
    served = {"request_efficiency": {"child_over_parent": {"low": 1.1, "high": 1.3}}}
    assert read_figures(summary() | {"serving": served}).request_efficiency == {"low": 1.1, "high": 1.3}


def test_figures_of_a_child_that_was_only_pruned() -> None:
    """Accuracies 0.45 of 0.50 and 0.81 of 0.90; requests/s 3000/10 of 2000/10 and 3000/80 of 2000/100."""
    found = read_figures(summarize(read_evidence(**inputs())))
    assert found.retention == pytest.approx({"low": 0.9, "high": 0.9})
    assert found.request_efficiency == pytest.approx({"low": 1.5, "high": 1.875})
    assert found.kv_accuracy_loss is None


@pytest.mark.parametrize("broken", [{}, {"recovery": {}}, {"recovery": {"kv_cache": [{}]}}, {"efforts": 3}])
def test_another_file_is_not_a_summary(broken: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"summary.json of the report cannot be read"):
        read_figures(broken)


def test_every_line_holds_at_its_bar_exactly() -> None:
    lines = judge(CONFIG, FIGURES, CHECKED, COMPLETE)
    assert is_met(lines)
    assert [line.name for line in lines] == [
        "retention.low",
        "retention.high",
        "request_efficiency.high",
        "kv_accuracy_loss",
        "export_checked",
        "lineage_complete",
        "evidence_of_this_child",
    ]


@pytest.mark.parametrize(
    ("figures", "bundle", "provenance", "failed", "figure"),
    [
        (
            Figures({"low": 1.0, "high": 0.9799}, FIGURES.request_efficiency, 0.0),
            CHECKED,
            COMPLETE,
            "retention.high",
            0.9799,
        ),
        (Figures({"high": 1.0}, FIGURES.request_efficiency, 0.0), CHECKED, COMPLETE, "retention.low", "not measured"),
        (Figures({"low": None, "high": 1.0}, {"high": 2}, 0.0), CHECKED, COMPLETE, "retention.low", "not measured"),
        (Figures(FIGURES.retention, {"high": 1.49}, 0.0), CHECKED, COMPLETE, "request_efficiency.high", 1.49),
        (Figures(FIGURES.retention, {"high": float("nan")}, 0.0), CHECKED, COMPLETE, "request_efficiency.high", None),
        (Figures(FIGURES.retention, {"high": 2.0}, 0.021), CHECKED, COMPLETE, "kv_accuracy_loss", 0.021),
        (Figures(FIGURES.retention, {"high": 2.0}, None), CHECKED, COMPLETE, "kv_accuracy_loss", "not measured"),
        (FIGURES, None, COMPLETE, "export_checked", "no bundle"),
        (
            FIGURES,
            Verdict(passed=False),
            COMPLETE,
            "export_checked",
            "unverified: a check of files and layout failed",
        ),
        (
            FIGURES,
            CHECKED,
            Provenance(11, ("ranking ab",), True),
            "lineage_complete",
            "11 of 12 inputs; unknown: ranking ab",
        ),
        (FIGURES, CHECKED, Provenance(0, (), True), "lineage_complete", "0 of 0 inputs"),
        (FIGURES, CHECKED, Provenance(12, (), False), "evidence_of_this_child", "no"),
    ],
)
def test_one_line_that_does_not_hold_is_enough(
    figures: Figures, bundle: Verdict | None, provenance: Provenance, failed: str, figure: float | str | None
) -> None:
    lines = judge(CONFIG, figures, bundle, provenance)
    (line,) = [line for line in lines if not line.met]
    assert line.name == failed
    assert figure is None or line.figure == figure
    assert not is_met(lines)


def test_what_is_not_asked_for_has_no_line() -> None:
    config = PromoteConfig(min_retention={}, min_request_efficiency={}, max_kv_accuracy_loss=None, require_export=False)
    lines = judge(config, Figures({}, {}, None), None, COMPLETE)
    assert [line.name for line in lines] == ["lineage_complete", "evidence_of_this_child"]
    assert is_met(lines)


def test_the_table_shows_figure_and_bar() -> None:
    console = Console(width=100)
    with console.capture() as shown:
        console.print(gate_table(judge(CONFIG, FIGURES, None, COMPLETE)))
    rows = {row[1:].split()[0]: row for row in shown.get().splitlines() if "." in row or "_" in row}
    assert ">= 0.98" in rows["retention.high"]
    assert "NOT MET" in rows["export_checked"]
    assert "NOT MET" not in rows["kv_accuracy_loss"]


def test_only_an_engine_that_loaded_it_makes_a_bundle_more_than_unverified() -> None:
    assert CHECKED.words == "unverified: files and layout checked; no engine has loaded it"
    loaded = Verdict(True, "vLLM 0.33.0 (CPU)", replies={"low": {"replies": 100, "agreeing": 99}})
    assert loaded.words == "verified by vLLM 0.33.0 (CPU), 99 of 100 replies are the reference's but for near ties"
    assert (
        Verdict(False, "vLLM 0.33.0 (CPU)", problems=("layer 3: no",)).words
        == "wrong by vLLM 0.33.0 (CPU): layer 3: no"
    )
    strict = CONFIG.but(require_engine=True)
    for config, verdict, met in ((CONFIG, CHECKED, True), (strict, CHECKED, False), (strict, loaded, True)):
        (line,) = [line for line in judge(config, FIGURES, verdict, COMPLETE) if line.name == "export_checked"]
        assert (line.figure, line.met) == (verdict.words, met)


@pytest.mark.parametrize("text", ['{"model": "a/b"}', '{"model": "it\'s"}', '{"min_retention": {"huge": 1}}'])
def test_configs_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        PromoteConfig.parse(text)


def test_promotions_and_rollbacks_are_a_stack() -> None:
    moves = [
        Move(1, "promote", 1, 0, None),
        Move(2, "promote", 2, 1, 1),
        Move(3, "promote", 3, 2, 2),
        Move(4, "rollback", 2, 3, 3),
        Move(5, "rollback", 1, 4, 2),
    ]
    assert [replay(moves[:count]).champion for count in range(6)] == [None, 1, 2, 3, 2, 1]
    assert [replay(moves[:count]).previous for count in range(6)] == [None, None, 1, 2, 1, None]
    assert replay(moves).last == 5
    assert replay(moves).has_promoted(3)
    assert not replay(moves).has_promoted(4)


def test_a_champion_set_by_hand_is_the_one_to_go_back_to() -> None:
    history = replay([Move(1, "promote", 7, 0, 4)])
    assert (history.champion, history.previous) == (7, 4)


def test_of_two_at_once_the_first_one_written_counts() -> None:
    history = replay([Move(1, "promote", 1, 0, None), Move(3, "promote", 3, 1, 1), Move(2, "promote", 2, 1, 1)])
    assert history.champions == (1, 2)
    assert [move.number for move in history.moves] == [1, 2]
    assert replay([*history.moves, Move(3, "promote", 3, 1, 1), Move(4, "promote", 3, 2, 2)]).champions == (1, 2, 3)


def test_a_record_with_a_hole_says_nothing() -> None:
    with pytest.raises(ArtifactError, match="move 1 is missing"):
        replay([Move(2, "promote", 2, 1, 1)])


@given(st.lists(st.tuples(st.sampled_from(["read", "write"]), st.integers(0, 3)), max_size=40))
def test_whatever_the_order_one_of_those_that_knew_the_same_counts(steps: list[tuple[str, int]]) -> None:
    """Four authors read and write in any order; each writes what it last knew."""
    moves: list[Move] = []
    known = {author: replay([]) for author in range(4)}
    for what, author in steps:
        if what == "read":
            known[author] = replay(moves)
        else:
            last, champion = known[author].last, known[author].champion
            moves.append(Move(len(moves) + 1, "promote", author, last, champion))
    counted = replay(moves).moves
    assert len({move.after for move in counted}) == len(counted), "two that knew the same cannot both count"
    assert [move.after for move in counted] == [0, *(move.number for move in counted)][: len(counted)]
    assert bool(counted) == bool(moves), "the first one written always counts"

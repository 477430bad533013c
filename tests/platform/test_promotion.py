"""The gate line by line, and the record of champions under every order of writing; all by hand."""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.costs.facts import Assumed
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.measure.paired import Difference
from moesaic.measure.report.evidence import read_evidence
from moesaic.measure.report.findings import summarize
from moesaic.measure.report.recovery import read_recovery, summarize_recovery
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.promote.gate import Figures, Provenance, gate_table, is_met, judge, read_figures
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.registry.champions import Move, replay
from tests.measure.recovery_inputs import recovery_inputs
from tests.measure.report_inputs import inputs

CONFIG = PromoteConfig(
    margin_points={"low": 5.0, "high": 2.0}, min_request_efficiency={"high": 1.5}, kv_margin_points={"high": 2.0}
)


def ahead(points: float, half_width: float) -> Difference:
    return Difference(points, points - half_width, points + half_width, 300, 1.0)


FIGURES = Figures({"low": ahead(-1, 3.9), "high": ahead(0, 1.9)}, {"low": 1.2, "high": 1.5}, {"high": ahead(-1, 0.9)})
COMPLETE = Provenance(known=12, unknown=(), evidence_is_its_own=True)
CHECKED = Verdict(passed=True)


def summary() -> dict[str, Any]:
    evidence = read_evidence(**inputs())
    return summarize(evidence) | {"recovery": summarize_recovery(read_recovery(evidence, **recovery_inputs()))}


def test_figures_of_a_recovered_child() -> None:
    """Accuracies 0.51 of 0.50 and 0.90 of 0.90; 0.50 and 0.90 with FP8."""
    found = read_figures(summary())
    assert in_points(found.accuracy) == pytest.approx({"low": 1, "high": 0})
    assert found.accuracy["low"].problems == 40
    assert found.accuracy["low"].low_points < 0 < found.accuracy["low"].high_points
    assert found.request_efficiency == pytest.approx({"low": 5 / 3, "high": 2})
    assert in_points(found.kv_accuracy) == pytest.approx({"low": -1, "high": 0})


def in_points(differences: Mapping[str, Difference]) -> dict[str, float]:
    return {effort: found.points for effort, found in differences.items()}


def test_what_was_measured_through_a_server_counts() -> None:
    served = {"request_efficiency": {"child_over_parent": {"low": 1.1, "high": 1.3}}}
    assert read_figures(summary() | {"serving": served}).request_efficiency == {"low": 1.1, "high": 1.3}


def test_figures_of_a_child_that_was_only_pruned() -> None:
    """Accuracies 0.45 of 0.50 and 0.81 of 0.90; requests/s 3000/10 of 2000/10 and 3000/80 of 2000/100."""
    found = read_figures(summarize(read_evidence(**inputs())))
    assert in_points(found.accuracy) == pytest.approx({"low": -5, "high": -9})
    assert found.request_efficiency == pytest.approx({"low": 1.5, "high": 1.875})
    assert found.kv_accuracy == {}


WITHOUT_INTERVALS = {
    "efforts": {"low": {"accuracy": {"difference": {"points": 1.0}}}},
    "request_efficiency": {"child_over_parent": {}},
}


@pytest.mark.parametrize(
    "broken", [{}, {"recovery": {}}, {"recovery": {"kv_cache": [{}]}}, {"efforts": 3}, WITHOUT_INTERVALS]
)
def test_another_file_is_not_a_summary(broken: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"summary.json of the report cannot be read"):
        read_figures(broken)


def test_a_child_that_keeps_every_margin_passes() -> None:
    lines = judge(CONFIG, FIGURES, CHECKED, COMPLETE)
    assert is_met(lines)
    assert [line.name for line in lines] == [
        "accuracy_points.low",
        "accuracy_points.high",
        "request_efficiency.high",
        "kv_accuracy_points.high",
        "export_checked",
        "lineage_complete",
        "evidence_of_this_child",
    ]


@pytest.mark.parametrize(
    ("figures", "failed", "figure"),
    [
        (replace(FIGURES, accuracy=FIGURES.accuracy | {"high": ahead(-0.2, 1.8)}), "accuracy_points.high", -0.2),
        (replace(FIGURES, accuracy={"high": ahead(0, 1)}), "accuracy_points.low", "not measured"),
        (replace(FIGURES, request_efficiency={"high": 1.49}), "request_efficiency.high", 1.49),
        (replace(FIGURES, request_efficiency={"high": float("nan")}), "request_efficiency.high", None),
        (replace(FIGURES, kv_accuracy={"high": ahead(-1, 1.1)}), "kv_accuracy_points.high", -1),
        (replace(FIGURES, kv_accuracy={}), "kv_accuracy_points.high", "not measured"),
    ],
)
def test_one_figure_that_does_not_clear_its_bar_is_enough(
    figures: Figures, failed: str, figure: float | str | None
) -> None:
    """A point estimate within the margin is not enough, if its interval is not."""
    (line,) = [line for line in judge(CONFIG, figures, CHECKED, COMPLETE) if not line.met]
    assert line.name == failed
    assert figure is None or line.figure == figure


def test_results_of_outside_harnesses_have_lines_by_task() -> None:
    """The interval must clear the margin, paired or not; what was not measured does not."""
    config = CONFIG.but(outside_margin_points={"sums": 5, "aime25/pass@1": 5, "hle": 5})
    unpaired = replace(ahead(-1, 3), problems=0)
    figures = replace(FIGURES, outside={"sums": ahead(-1, 4.5), "aime25/pass@1": unpaired})
    lines = {line.name: line for line in judge(config, figures, CHECKED, COMPLETE) if "outside" in line.name}
    assert {name: (line.shown, line.met) for name, line in lines.items()} == {
        "outside.sums": ("-1.0 [-5.5, +3.5], n = 300", False),
        "outside.aime25/pass@1": ("-1.0 [-4.0, +2.0], unpaired", True),
        "outside.hle": ("not measured", False),
    }


@pytest.mark.parametrize(
    ("bundle", "provenance", "failed", "figure"),
    [
        (None, COMPLETE, "export_checked", "no bundle"),
        (
            Verdict(passed=False),
            COMPLETE,
            "export_checked",
            "unverified: a check of files and layout failed",
        ),
        (
            CHECKED,
            Provenance(11, ("ranking ab",), True),
            "lineage_complete",
            "11 of 12 inputs; unknown: ranking ab",
        ),
        (CHECKED, Provenance(0, (), True), "lineage_complete", "0 of 0 inputs"),
        (CHECKED, Provenance(12, (), False), "evidence_of_this_child", "no"),
    ],
)
def test_one_line_that_does_not_hold_is_enough(
    bundle: Verdict | None, provenance: Provenance, failed: str, figure: str
) -> None:
    lines = judge(CONFIG, FIGURES, bundle, provenance)
    (line,) = [line for line in lines if not line.met]
    assert (line.name, line.figure) == (failed, figure)
    assert not is_met(lines)


@pytest.mark.parametrize("recipe", ["tiny_cpu", "tiny_cpu_full", *(name for name in RECIPES if name.startswith("gpt"))])
def test_a_child_as_good_as_its_parent_passes_a_recipes_gate(recipe: str) -> None:
    """Nine times of ten, by the normal distribution: the lower end is 1.96 standard errors below what was measured.

    Greedy replies of the tiny reasoner differ on one problem of twenty at low effort, and on fewer at others. Sampled
    ones differ wherever chance decides: a problem solved with probability p adds 2 p (1 - p) to the variance, divided
    by the replies; its mean is 1/3 for p spread evenly over 0 to 1, and less for a model that mostly knows.
    """
    values = RECIPES[recipe]()
    if recipe.startswith("tiny"):
        variances, num_tasks = {"low": 0.05, "medium": 0.02, "high": 0.01}, 6.0
    else:
        of_one = 1 / 3 / values.evaluate.epochs
        variances, num_tasks = dict.fromkeys(("low", "medium", "high"), of_one), Assumed().num_tasks
    passes = 1.0
    for margins in (values.promote.margin_points, values.promote.kv_margin_points):
        for effort, margin in margins.items():
            standard_error = 100 * sqrt(variances[effort] / (num_tasks * values.evaluate.problems_per_task))
            passes *= NormalDist().cdf(margin / standard_error - 1.96)
    assert passes >= 0.9


def test_what_is_not_asked_for_has_no_line() -> None:
    config = PromoteConfig(margin_points={}, min_request_efficiency={}, kv_margin_points={}, require_export=False)
    lines = judge(config, Figures({}, {}, {}), None, COMPLETE)
    assert [line.name for line in lines] == ["lineage_complete", "evidence_of_this_child"]
    assert is_met(lines)


def test_the_table_shows_estimate_interval_number_and_bar() -> None:
    console = Console(width=100)
    with console.capture() as shown:
        console.print(gate_table(judge(CONFIG, FIGURES, None, COMPLETE)))
    rows = {row[1:].split()[0]: row for row in shown.get().splitlines() if "." in row or "_" in row}
    assert "-1.0 [-4.9, +2.9], n = 300" in rows["accuracy_points.low"]
    assert "interval above -5" in rows["accuracy_points.low"]
    assert "NOT MET" in rows["export_checked"]
    assert "NOT MET" not in rows["kv_accuracy_points.high"]


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


@pytest.mark.parametrize("text", ['{"model": "a/b"}', '{"model": "it\'s"}', '{"margin_points": {"huge": 1}}'])
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

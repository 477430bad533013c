"""What the report says of recovery, by hand from ``recovery_inputs``."""

from typing import Any

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.measure.report.evidence import read_evaluation, read_evidence
from moesaic.measure.report.page import draw_pictures, render_page
from moesaic.measure.report.recovery import RecoveryEvidence, read_recovery, summarize_recovery
from moesaic.measure.report.summary import summarize_all
from tests.measure.recovery_inputs import ACCURACIES, recovery, recovery_inputs
from tests.measure.report_inputs import evaluation, inputs, page_text, point


def read(search: dict[str, Any] | None = None, **changed: Any) -> RecoveryEvidence:
    return read_recovery(read_evidence(**(inputs() | (search or {}))), **(recovery_inputs() | changed))


def summarized(search: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    return summarize_recovery(read(search, **changed))


def text(search: dict[str, Any] | None = None, **changed: Any) -> str:
    evidence = read_evidence(**(inputs() | (search or {})))
    return page_text(evidence, summarize_all(evidence, read(search, **changed)))


def test_retention_tokens_and_what_distillation_recovered() -> None:
    """Low: 0.40 pruned, 0.46 distilled, 0.51 averaged of 0.50; high: 0.80, 0.88 and 0.90 of 0.90."""
    summary = summarized()
    assert summary["retention"] == pytest.approx({"low": 1.02, "high": 1.0})
    assert summary["tokens_ratio"] == pytest.approx({"low": 0.9, "high": 0.75})
    assert summary["recovered_by_distillation"] == pytest.approx({"low": 0.6, "high": 0.8})
    assert list(summary["stages"]) == list(ACCURACIES)
    pruned = summary["stages"]["pruned"]["efforts"]["low"]
    assert pruned["retention"] == pytest.approx(0.8)
    add = pruned["tasks"]["add"]
    assert (add["parent"], add["child"], add["retention"]) == pytest.approx((0.55, 0.45, 0.45 / 0.55))
    assert (add["difference"]["points"], add["difference"]["problems"]) == (pytest.approx(-10), 20)
    assert in_points(summary["differences"]) == pytest.approx([1, 0], abs=1e-9)


def in_points(differences: dict[str, Any]) -> list[float]:
    return [found["points"] for found in differences.values()]


def test_request_efficiency_at_equal_effort_and_at_equal_accuracy() -> None:
    """Requests/s: parent 2000/10 = 200 and 2000/100 = 20; averaged 3000/9 = 333.3 and 3000/75 = 40."""
    efficiency = summarized()["request_efficiency"]
    assert efficiency["equal_effort"] == pytest.approx({"low": 5 / 3, "high": 2})
    assert (efficiency["best_effort"], efficiency["best"]) == ("high", pytest.approx(2))
    assert efficiency["models"]["pruned"] == pytest.approx({"low": 1.5, "high": 1.5})
    assert efficiency["equal_accuracy"] == pytest.approx({"low": 5 / 3, "high": 2})
    worse = ACCURACIES | {"averaged": (0.51, 0.89), "fp8": (0.5, 0.89)}
    assert summarized(recovery=recovery(accuracies=worse))["request_efficiency"]["equal_accuracy"]["high"] is None


def test_the_baselines_speed_is_its_ratio_to_the_parent_beside_it() -> None:
    """It was 1.6 times the parent on its day, so 3200 tokens/s on this one; 75 tokens make 42.67 requests/s."""
    rates = relative_rates(summarized())
    assert rates["greedy", "high", "bf16"] == pytest.approx(3200 / 75 / 20)
    assert rates["averaged", "high", "bf16"] == pytest.approx(2)
    assert rates["parent", "low", "bf16"] == pytest.approx(10)
    assert not any(model == "greedy" for model, _, _ in relative_rates(summarized(measurements_baseline=None)))


def test_speed_with_an_fp8_cache_is_that_of_bf16_until_it_is_measured() -> None:
    summary = summarized()
    assert not summary["request_efficiency"]["fp8_was_timed"]
    assert relative_rates(summary)["averaged", "high", "fp8"] == pytest.approx(2)
    measured = inputs()["measurements"]
    speeds = {"parent": 2500.0, "child": 4000.0}
    measured["points"] += [point(model, (100, 50, 8), speed) | {"kv_cache": "fp8"} for model, speed in speeds.items()]
    summary = summarized({"measurements": measured})
    assert summary["request_efficiency"]["fp8_was_timed"]
    assert relative_rates(summary)["parent", "high", "fp8"] == pytest.approx(1.25)
    assert relative_rates(summary)["averaged", "high", "fp8"] == pytest.approx(4000 / 75 / 20)
    assert relative_rates(summary)["averaged", "high", "bf16"] == pytest.approx(2)


def relative_rates(summary: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    points = summary["frontier"]["points"]
    return {(entry["model"], entry["effort"], entry["kv_cache"]): entry["relative_rate"] for entry in points}


def test_the_frontier_holds_every_model_and_cache() -> None:
    models = {(model, kv_cache) for model, _, kv_cache in relative_rates(summarized())}
    plain = {"parent", "pruned", "distilled", "policy high", "policy mixed", "averaged", "greedy"}
    assert models == {(model, "bf16") for model in plain} | {
        (model, "fp8") for model in ("parent", "averaged", "greedy")
    }


def test_the_cache_table_is_relative_to_the_same_model() -> None:
    rows = {(row["model"], row["kv_cache"]): row["efforts"] for row in summarized()["kv_cache"]}
    changes = {key: [figures["change"]["points"] for figures in efforts.values()] for key, efforts in rows.items()}
    assert changes["child", "bf16"] == [0, 0]
    assert changes["child", "fp8_unit"] == pytest.approx([-10, -4])
    assert changes["child", "fp8"] == pytest.approx([-1, 0], abs=1e-9)
    assert changes["parent", "fp8"] == pytest.approx([0, -2], abs=1e-9)
    assert len(summarized(evaluation_parent_fp8=None)["kv_cache"]) == 3


def test_the_standard_error_is_of_a_mean_of_tasks() -> None:
    """Tasks of 0.55 and 0.45 with 20 problems each: the root of (0.2475 + 0.2475) / 20, halved."""
    effort = read_evaluation(evaluation("puzzle", 0.5, 0.5)).efforts["low"]
    assert effort.standard_error == pytest.approx((2 * 0.2475 / 20) ** 0.5 / 2)


def test_child_and_baseline_after_each_stage() -> None:
    difference = summarized()["baseline"]["differences"]["averaged"]
    assert in_points(difference["efforts"]) == pytest.approx([5, 10])
    assert (difference["mean"]["points"], difference["mean"]["problems"]) == (pytest.approx(7.5), 40)
    assert (difference["winner"] == "child") == (difference["mean"]["low_points"] > 0)
    assert summarized()["baseline"]["memory_mib"] == {"long": {"child": 4.0, "baseline": 4.0}}
    far_below = {stage: (0.1, 0.2) for stage in ACCURACIES}
    assert (
        summarized(recovery_baseline=recovery("greedy", far_below))["baseline"]["differences"]["averaged"]["winner"]
        == "child"
    )


def test_the_curve_pairs_training_with_held_out_and_leaves_out_what_was_not_computed() -> None:
    series = read().child.series()
    assert series["kl"] == {"training": [(1, 0.75), (2, 0.25)], "held out": [(0, 0.9), (2, 0.4)]}
    assert list(series) == ["loss", "kl"]
    distillation = summarized()["distillation"]
    assert distillation["steps"] == 2
    assert distillation["curves"]["loss"] == {
        "training": {"first": 1.25, "last": 0.5},
        "held out": {"first": 1.5, "last": 0.75},
    }


def test_the_sentences_are_computed() -> None:
    shown = text()
    for part in (
        "keeps 89 % of the parameters, 75 % of the experts, 75 % of those that a token uses, "
        "75 % of their width and "
        "0 of 1 full-attention layers (the others",
        "Of the parent's accuracy it keeps 102.0 % at low and 100.0 % at high effort, a difference of +1.0 [-6.5,",
        "it is at best 2.00x the parent, at high effort.",
        "Pruning alone changed accuracy by -10.0 [-22.5, +2.5] points at low and -10.0 [-22.5, +2.5] points at high.",
        "distillation brought back 60.0 % at low and 80.0 % at high: +6.0 [-3.5, +16.0] points at low",
        "policy high -1.0 [-8.0, +6.5] points at low and +3.0 [-4.5, +10.5] points at high;",
        "their average +5.0 [-4.0, +14.0] points at low and +2.0 [-5.5, +9.5] points at high.",
        "0.90x at low and 0.75x at high; before recovery 1.00x at low and 1.00x at high.",
        "answers 1.67x as many requests as the parent at low effort and 2.00x as many",
        "by -10.0 [-21.0, +0.5] points at low and -4.0 [-13.0, +5.0] points at high with unit scales, and by -1.0 [",
        "After identical recovery puzzle and greedy are not told apart in the mean over efforts: +7.5 [-1.5, +15.8]",
    ):
        assert part in shown


def test_an_accuracy_that_the_child_does_not_reach_is_said() -> None:
    worse = ACCURACIES | {"averaged": (0.51, 0.89), "fp8": (0.5, 0.89)}
    assert "At no effort is its measured accuracy as high as the parent's at high effort." in text(
        recovery=recovery(accuracies=worse)
    )


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        (
            dict.fromkeys(ACCURACIES, (0.9, 1.0)),
            "the baseline greedy is ahead of puzzle in the mean over efforts: -24.5",
        ),
        (ACCURACIES, "puzzle and greedy are not told apart in the mean over efforts: +0.0"),
        (dict.fromkeys(ACCURACIES, (0.1, 0.2)), "puzzle is ahead of greedy in the mean over efforts: +55.5"),
    ],
)
def test_the_verdict_follows_from_the_interval(accuracies: dict[str, tuple[float, float]], words: str) -> None:
    assert words in text(recovery_baseline=recovery("greedy", accuracies))


def test_nothing_lost_is_nothing_recovered() -> None:
    unharmed = ACCURACIES | {"pruned": (0.5, 0.9)}
    given = {"recovery": recovery(accuracies=unharmed), "recovery_baseline": None}
    summary = summarized(**given)
    assert summary["recovered_by_distillation"] == {"low": None, "high": None}
    assert summary["baseline"] is None
    assert "Pruning lost no accuracy" in text(**given)
    harmed = ACCURACIES | {"pruned": (0.4, 0.9)}
    assert "60.0 % at low (pruning lost none at high effort): +6.0" in text(recovery=recovery(accuracies=harmed))


def test_a_search_that_began_from_an_earlier_round_is_told_apart() -> None:
    search = {"evaluation_parent": evaluation("parent", 0.5, 0.9) | {"parameters": 320}}
    assert not summarized(search)["searched_parent"]
    assert "keeps 50 % of the parameters. Of" in text(search)
    assert "an earlier round, which has 180 of the parent's 320 parameters" in text(search)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recovery": recovery("mystery")}, "is of 'mystery', but the child evaluated is 'puzzle'"),
        ({"recovery_baseline": recovery("puzzle")}, "of 'puzzle' itself"),
        ({"recovery": recovery(accuracies={"pruned": (0.4, 0.8)})}, "'puzzle' lacks .'distilled', 'averaged'"),
        ({"recovery": {"candidate": "puzzle"}}, "cannot be read .*stages"),
    ],
)
def test_inputs_that_do_not_fit_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        summarized(**changed)


def test_a_benchmark_of_another_context_is_refused() -> None:
    other = {"points": [point(model, (10, 50, 8), 100.0) for model in ("parent", "child")]}
    with pytest.raises(ArtifactError, match="no point of 100 input and 50 output tokens"):
        summarized(measurements_baseline=other)


def test_the_page_shows_recovery_first_and_the_search_after_it() -> None:
    evidence, recovered = read_evidence(**inputs()), read()
    pictures = draw_pictures(evidence, recovered)
    assert "efforts" not in pictures and len(pictures) == 12
    summary = summarize_all(evidence, recovered)
    page = render_page("A title", evidence, summary, pictures)
    assert page.count('src="data:image/png;base64,') == 12
    places = [page.index(f'<h2 id="{name}">') for name in ("frontier", "contributions", "distillation", "architecture")]
    assert places == sorted(places)
    for part in (
        "KV cache in FP8",
        "after identical recovery",
        "policy mixed",
        "FP8 with calibrated scales",
        "BF16 only",
    ):
        assert part in page
    assert "://" not in page


def test_an_undistilled_child_has_no_curve_and_a_page_all_the_same() -> None:
    evidence, recovered = read_evidence(**inputs()), read(recovery=recovery() | {"curve": []}, recovery_baseline=None)
    assert recovered.child.series() == {}
    summary = summarize_all(evidence, recovered)
    assert "The distillation" in render_page("A title", evidence, summary, draw_pictures(evidence, recovered))

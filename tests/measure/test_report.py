"""The report's numbers and sentences, by hand from ``report_inputs``."""

from typing import Any

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.measure.report.evidence import read_evidence
from moesaic.measure.report.findings import summarize
from moesaic.measure.report.page import add_outside, draw_pictures, render_page
from moesaic.measure.report.summary import summarize_all
from tests.measure.report_inputs import CHILD, evaluation, inputs, page_text, solution

OTHER_PROBLEMS = {"split": "validation", "count": 40, "digest": "0f"}


def summary(**changed: Any) -> dict[str, Any]:
    return summarize(read_evidence(**(inputs() | changed)))


def text(**changed: Any) -> str:
    evidence = read_evidence(**(inputs() | changed))
    return page_text(evidence, summarize_all(evidence))


def test_sizes() -> None:
    found = summary()
    assert found["child"] == "puzzle"
    assert found["parameters"] == {"parent": 180, "child": 160, "ratio": 160 / 180}
    assert found["experts"] == {"parent": 8, "child": 6, "ratio": 0.75}
    assert found["experts_per_token"] == {"parent": 4, "child": 3, "ratio": 0.75}
    assert found["expert_width"] == {"parent": 128, "child": 96, "ratio": 0.75}
    assert found["windowed_layers"] == {"full_in_parent": 1, "windowed_in_child": 1, "full_in_child": 0}
    assert found["kv_mib_per_request"]["long"] == {"parent": 1.25, "child": 0.5, "ratio": 0.4}


def test_accuracy_retention_and_tokens() -> None:
    efforts = summary()["efforts"]
    assert list(efforts) == ["low", "high"]
    assert efforts["low"]["accuracy"]["retention"] == pytest.approx(0.9)
    assert efforts["high"]["tasks"]["add"]["retention"] == pytest.approx(0.86 / 0.95)
    assert efforts["low"]["accuracy"]["difference"]["points"] == pytest.approx(-5)
    assert summary()["problems"] == {"split": "test", "count": 40, "digest": "0f"}
    assert efforts["high"]["tokens_per_request"] == {"parent": 100, "child": 80, "ratio": 0.8}


def test_the_best_batch_counts_and_every_batch_is_listed() -> None:
    throughput = summary()["throughput"]
    assert throughput["100/50"]["best"] == {"parent": 2000, "child": 3000, "ratio": 1.5}
    assert throughput["100/50"]["speedup_by_batch"] == {"2": 1.2, "8": 1.5}
    assert throughput["10/50"]["best"]["ratio"] == 1


def test_request_efficiency_is_of_the_longest_context() -> None:
    """R: parent 2000/100 = 20 and 2000/10 = 200; child 3000/80 = 37.5 and 3000/10 = 300 requests per second."""
    found = summary()["request_efficiency"]
    assert (found["input_tokens"], found["output_tokens"]) == (100, 50)
    rates = {(point["model"], point["effort"]): point["relative_rate"] for point in found["points"]}
    assert rates == pytest.approx(
        {("parent", "low"): 10, ("parent", "high"): 1, ("child", "low"): 15, ("child", "high"): 1.875}
    )
    assert all(point["on_frontier"] for point in found["points"])
    assert found["child_over_parent"] == pytest.approx({"low": 1.5, "high": 1.875})
    assert (found["best_effort"], found["best"]) == ("high", pytest.approx(1.875))


def test_predictions_meet_the_measurement_of_the_same_workload() -> None:
    """Prefill 10 against 8 ms, decode 6 against 5 ms, 50 steps."""
    (found,) = summary()["predictions"]
    assert found["predicted"] == pytest.approx({"throughput": 310 / 258, "prefill": 1.25, "decode": 1.2})
    assert found["measured"]["throughput"] == pytest.approx(1.2)


def test_a_workload_that_was_not_measured_says_so() -> None:
    given = inputs()
    given["measurements"]["points"] = given["measurements"]["points"][:2]
    assert summary(**given)["predictions"][0]["measured"] is None


def test_refinement_compares_what_was_measured_with_what_was_expected() -> None:
    """Sums miss by 0.06, 0.03 and 0.02, learnt expectations by 0.06, 0.04 and 0.03."""
    found = summary()["refinement"]
    assert found["misses"] == pytest.approx({"sum": 0.11 / 3, "expected": 0.13 / 3})
    shown = text()
    assert "The search's own choice has a damage of 0.24 where the sum of its scores says 0.18. 3 assemblies" in shown
    assert "the best of them, the child, has 0.22 (-8.3 %)" in shown


def test_seeds_of_random_are_one_rival_with_a_spread() -> None:
    rivals = {rival["name"]: rival for rival in summary()["rivals"]}
    assert list(rivals) == ["puzzle", "greedy", "random"]
    assert rivals["random"]["models"] == ["random-0", "random-1"]
    assert rivals["random"]["damage"] == pytest.approx(0.5)
    assert rivals["random"]["accuracy"]["high"] == pytest.approx({"mean": 0.5, "min": 0.4, "max": 0.6})
    assert rivals["random"]["mean_accuracy"] == pytest.approx(0.4)


def test_every_rival_is_compared_with_the_child_problem_by_problem_and_by_its_cost() -> None:
    """Child 45 and 81 %, greedy 40 and 80 %, random 30 and 50 %; the child's mean is 63 %. One has no known damage."""
    given = inputs()
    given["architecture"]["candidates"]["uniform_reap"] = solution(CHILD, 0.2, 625.0) | {"damage": None}
    given["baselines"].append(evaluation("uniform_reap", 0.45, 0.81))
    rivals = {rival["name"]: rival for rival in summary(**given)["rivals"]}
    assert rivals["puzzle"]["child_minus"] is None
    points = {name: rival["child_minus"]["points"] for name, rival in rivals.items() if name != "puzzle"}
    assert points == pytest.approx({"greedy": 3.0, "random": 23.0, "uniform_reap": 0.0})
    assert rivals["greedy"]["child_minus"]["low_points"] < 3 < rivals["greedy"]["child_minus"]["high_points"]
    assert rivals["uniform_reap"]["damage"] is None
    assert rivals["uniform_reap"]["memory_ratio"] == {"long": 1.0}
    assert rivals["uniform_reap"]["throughput_ratio"] == {"long": 1.25}
    shown = text(**given)
    assert "uniform_reapnot scorednot run" in shown
    given["architecture"]["candidates"]["greedy"]["breaks"] = ["experts <= 6 (it has 7)"]
    given["baselines"][0] = evaluation("greedy", 0.9, 0.9)
    assert "greedy (experts <= 6 (it has 7))" in text(**given)
    assert summary(**given)["verdicts"]["accuracy"]["name"] == "uniform_reap", "a rival must keep the limits"
    assert "Left out: uniform (no single expert count keeps the limits)." in shown


def test_the_headline_is_computed() -> None:
    shown = text()
    for part in (
        "The child keeps 75 % of the experts and 89 % of the parameters, uses 75 % of the experts per token, "
        "keeps 75 % of their width, "
        "turns 1 of 1 full-attention layers",
        "keeps 90.0 % of the parent's accuracy at high effort (-9.0 [-20.0, +1.5] points), and generates 1.50x the",
        "that is at best 1.88x, at high effort",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("child", "words"),
    [
        (
            (0.9, 0.9),
            "higher at low effort (+40.0 [+22.5, +55.0] points) and not told apart at high effort (+0.0 [-7.5",
        ),
        ((0.5, 0.4), "lower at high effort (-50.0 [-65.0, -30.0] points) and not told apart at low effort (+0.0 ["),
        ((0.5, 0.9), "not told apart at low and high effort (+0.0 [-7.5, +7.5], +0.0 [-7.5, +7.5] points)."),
        ((0.9, 0.4), "higher at low effort (+40.0 [+22.5, +55.0] points) and lower at high effort (-50.0 [-65.0"),
    ],
)
def test_the_page_leads_with_who_is_ahead_by_the_interval(child: tuple[float, float], words: str) -> None:
    """Parent: 50 and 90 %. Requests: 1.5 times the tokens per second, over 0.8 of the tokens each at high effort."""
    shown = text(evaluation_child=evaluation("puzzle", *child, tokens_high=80))
    assert f"Against its parent the child's accuracy is {words}" in shown
    assert shown.index(words) < shown.index("The child keeps 75 % of the experts")
    assert "In requests per second it is 1.50x at low and 1.88x at high effort." in shown
    assert (
        "timed in process. In output tokens per second, each at its best load, it is 1.00x (10/50 tokens), 1.50x"
        in shown
    )


@pytest.mark.parametrize(
    ("greedy", "words"),
    [
        ((0.2, 0.4), "puzzle wins: 63.0 % against 30.0 %"),
        ((0.7, 0.95), "the baseline greedy wins: 63.0 % against 82.5 %"),
        ((0.45, 0.8), "puzzle and greedy are not told apart: 63.0 % against 62.5 %"),
    ],
)
def test_the_verdict_follows_from_the_interval(greedy: tuple[float, float], words: str) -> None:
    shown = text(baselines=[evaluation("greedy", *greedy)])
    assert "By the damage of the whole model puzzle wins: 0.22 against 0.33 of greedy" in shown
    assert f"mean over tasks and efforts, {words} of greedy" in shown


def test_missing_evaluations_are_said() -> None:
    assert "No baseline was evaluated" in text(baselines=[])
    alone = inputs()["architecture"]
    alone["candidates"] = {"puzzle": alone["candidates"]["puzzle"]}
    assert "No baseline was run whole to compare the child with." in text(architecture=alone, baselines=[])


def test_a_parent_without_accuracy_leaves_retention_undefined() -> None:
    parent = evaluation("parent", 0.05, 0.0)
    assert summary(evaluation_parent=parent)["efforts"]["high"]["accuracy"]["retention"] is None
    assert "an undefined share of the parent's accuracy" in text(evaluation_parent=parent)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evaluation_child": evaluation("mystery", 0.5, 0.5)}, "'mystery' is of none of the candidates found: puzzle"),
        (
            {"evaluation_child": evaluation("puzzle", 0.5, 0.5) | {"problems": OTHER_PROBLEMS}},
            "only figures on the same problems compare",
        ),
        ({"measurements": {"hardware": {}, "points": []}}, "holds no point of both models"),
        ({"scores": {"rows": []}}, "cannot be read .*metric"),
    ],
)
def test_inputs_that_do_not_fit_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        summary(**changed)


def test_the_page_needs_nothing_beside_it() -> None:
    evidence = read_evidence(**inputs())
    pictures = draw_pictures(evidence)
    page = render_page("A <title>", evidence, summarize_all(evidence), pictures)
    assert page.count('src="data:image/png;base64,') == len(pictures) == 9
    assert "://" not in page
    assert "<script" not in page
    assert "A &lt;title&gt;" in page
    assert "a &lt;fast&gt; machine" in page
    assert "Left out: uniform" in page
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
    assert draw_pictures(evidence) == pictures
    assert "Results of outside harnesses" in add_outside(
        page, {"effort": None, "suites": {}, "left_out": {}, "models": {}}
    )

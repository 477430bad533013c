"""What the report makes of the sweeps through a server, by hand from ``serving_inputs``."""

from typing import Any

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.measure.report.evidence import read_evidence
from moesaic.measure.report.page import draw_pictures, render_page
from moesaic.measure.report.recovery import read_recovery
from moesaic.measure.report.serving import read_serving, served_frontier, summarize_serving
from moesaic.measure.report.summary import summarize_all
from tests.measure.recovery_inputs import recovery
from tests.measure.report_inputs import inputs
from tests.measure.serving_inputs import serving

EVIDENCE = read_evidence(**inputs())


def summary(**changed: Any) -> dict[str, Any]:
    return summarize_serving(read_serving(serving() | changed, EVIDENCE, None))


def test_the_best_configuration_of_each_workload() -> None:
    found = summary()
    assert found["tokens_per_s"]["long"] == {"parent": 2000, "child": 3100, "ratio": 1.55}
    assert found["tokens_per_s"]["short"] == {"parent": 400, "child": 400, "ratio": 1.0}
    assert [(best["model"], best["concurrency"]) for best in found["best"]] == [
        *(("parent", 8), ("child", 8), ("parent", 2), ("child", 2))
    ]
    assert found["best"][1]["requests_per_s"] == pytest.approx(3100 / 50)
    assert found["best"][1]["tokens_per_s_per_user"] == pytest.approx(3100 / 8)


def test_more_users_get_more_together_and_less_each_so_both_points_are_kept() -> None:
    assert summary()["pareto"]["parent"]["long"] == [2, 8]


def test_the_speed_up_stands_beside_the_one_in_process_and_the_predicted_one() -> None:
    """Pairs of repeats: 990 / 900, 1200 / 1000, 1320 / 1100."""
    found = {(row["workload"], row["concurrency"]): row for row in summary()["speedups"]}
    assert found["long", 2]["served"] == pytest.approx({"median": 1.2, "min": 1.1, "max": 1.2})
    assert found["long", 2]["in_process"] == pytest.approx(1.2)
    assert found["long", 2]["predicted"] == pytest.approx(310 / 258)
    assert found["long", 8]["in_process"] == pytest.approx(1.5)
    assert found["long", 8]["predicted"] is None


def test_requests_per_second_are_of_the_longest_workload_as_it_is_served() -> None:
    """R: parent 2000 / 100 and 2000 / 10; child 3100 / 80 and 3100 / 10."""
    found = summary()["request_efficiency"]
    assert found["workload"] == "long"
    assert found["child_over_parent"] == pytest.approx({"low": 1.55, "high": 1.9375})
    assert (found["best_effort"], found["best"]) == ("high", pytest.approx(1.9375))
    points = served_frontier(read_serving(serving(), EVIDENCE, None))
    assert [point.relative_rate for point in points] == pytest.approx([10, 1, 15.5, 1.9375])


def test_the_parent_against_itself() -> None:
    """Odd repeats of long at 2 users have a mean of 1000, as has the even one."""
    found = summary()["parent_twice"]
    assert found == {"points": 3, "agreeing": 3, "furthest": pytest.approx(1.0)}


@pytest.mark.parametrize("kv_cache", ["bf16", "fp8_unit", "fp8"])
def test_the_recovered_child_answers_as_it_did_with_the_cache_it_is_served_with(kv_cache: str) -> None:
    given = dict.fromkeys(("recovery_baseline", "evaluation_parent_fp8", "measurements_baseline"))
    recovered = read_recovery(EVIDENCE, recovery=recovery(), **given)
    points = served_frontier(read_serving(serving(kv_cache), EVIDENCE, recovered))
    stage = {"bf16": "averaged"}.get(kv_cache, kv_cache)
    expected = [result.accuracy for result in recovered.child.stages[stage].efforts.values()]
    assert [point.accuracy for point in points if point.deployment.model == "child"] == expected


def test_page_and_pictures() -> None:
    served = read_serving(serving(), EVIDENCE, None)
    pictures = draw_pictures(EVIDENCE, None, served)
    assert {"served_frontier", "served_throughput", "served_latency"} < pictures.keys()
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
    page = render_page("A test", EVIDENCE, summarize_all(EVIDENCE, None, served), pictures)
    assert page.index('id="served_frontier"') < page.index("The child keeps"), "what clients see comes first"
    assert "1.20x" in page
    assert "agree within the spread at 3 of\n3 points" in page


def test_the_verdict_is_of_the_models_as_they_are_served() -> None:
    """The recovered child with its FP8 cache: 50 and 89 % of the parent's 50 and 90 %; speeds are the server's."""
    given = dict.fromkeys(("recovery_baseline", "evaluation_parent_fp8", "measurements_baseline"))
    recovered = read_recovery(EVIDENCE, recovery=recovery(), **given)
    found = summarize_all(EVIDENCE, recovered, read_serving(serving("fp8"), EVIDENCE, recovered))["verdict"]
    child = recovered.child.stages["fp8"].efforts
    assert {effort: each["points"] for effort, each in found["differences"].items()} == pytest.approx(
        {effort: 100 * (child[effort].accuracy - recovered.parent.efforts[effort].accuracy) for effort in child}
    )
    assert found["tokens_per_s"] == pytest.approx({"long": 1.55, "short": 1.0})
    assert found["requests_per_s"]["low"] == pytest.approx(1.55 * 10 / child["low"].tokens_per_request)
    assert found["engine"] == "moesaic"


def test_a_broken_input_is_named() -> None:
    with pytest.raises(ArtifactError, match="serving given to the report cannot be read"):
        summary(points=[{"model": "parent"}])

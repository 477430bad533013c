"""Request-level efficiency by hand."""

import random

import pytest

from moesaic.core.config import CacheDtype, Effort
from moesaic.core.errors import ConfigError
from moesaic.measure.efficiency import (
    Deployment,
    FrontierPoint,
    Quality,
    best_throughput,
    frontier_points,
    gain_at_accuracy,
    pareto_frontier,
    rate_ratios,
    recovered_share,
    request_rate,
    retention,
)

PARENT, CHILD = Deployment("parent", "high"), Deployment("child", "high")


def test_request_rate_is_throughput_over_tokens() -> None:
    assert request_rate(5700, 11400) == 0.5
    with pytest.raises(ConfigError, match="at least one token"):
        request_rate(5700, 0)


def test_the_papers_throughput_gain_shrinks_by_longer_answers() -> None:
    """9.3K against 5.7K tokens/s is 1.63x; with answers 1.2648 times as long it is the paper's 1.29x per request."""
    qualities = {PARENT: Quality(0.70, 10_000), CHILD: Quality(0.71, 12_648)}
    parent, child = frontier_points(qualities, {("parent", "bf16"): 5700.0, ("child", "bf16"): 9300.0})
    assert parent.relative_rate == 1
    assert parent.requests_per_s == pytest.approx(0.57)
    assert round(9300 / 5700, 2) == 1.63
    assert child.relative_rate == pytest.approx(1.29, abs=0.0005)
    assert child.accuracy == 0.71


def test_efforts_and_caches_are_all_relative_to_the_parent_at_high_effort_with_bf16() -> None:
    qualities = {
        PARENT: Quality(0.9, 100),
        Deployment("parent", "low"): Quality(0.5, 20),
        Deployment("parent", "high", "fp8"): Quality(0.9, 100),
        CHILD: Quality(0.8, 80),
    }
    speeds = {("parent", "bf16"): 1000.0, ("parent", "fp8"): 1500.0, ("child", "bf16"): 1600.0}
    assert [point.relative_rate for point in frontier_points(qualities, speeds)] == pytest.approx([1, 5, 1.5, 2])


def test_without_the_reference_nothing_is_relative() -> None:
    with pytest.raises(ConfigError, match=r"reference .*parent.* was not evaluated"):
        frontier_points({CHILD: Quality(0.8, 80)}, {("child", "bf16"): 1.0})


def test_best_configuration_is_the_fastest() -> None:
    assert best_throughput([3.0, 9.0, 7.0]) == 9.0
    with pytest.raises(ConfigError, match="no throughput was measured"):
        best_throughput([])


def point(rate: float, accuracy: float) -> FrontierPoint:
    return FrontierPoint(CHILD, rate, rate, accuracy)


def test_frontier_by_hand() -> None:
    kept = [point(1, 0.9), point(2, 0.8), point(5, 0.4)]
    beaten = [point(1, 0.8), point(1.5, 0.8), point(4, 0.4), point(0.5, 0.9)]
    assert pareto_frontier(kept + beaten) == kept
    assert pareto_frontier([]) == []


def test_frontier_is_what_brute_force_leaves() -> None:
    generator = random.Random(0)
    for _ in range(50):
        points = list({point(generator.randint(1, 6), generator.randint(1, 6)) for _ in range(12)})
        undominated = [
            one
            for one in points
            if not any(
                other != one and other.relative_rate >= one.relative_rate and other.accuracy >= one.accuracy
                for other in points
            )
        ]
        assert pareto_frontier(points) == sorted(undominated, key=lambda one: one.relative_rate)


def test_retention() -> None:
    assert retention(0.45, 0.9) == 0.5
    assert retention(0.9, 0.45) == 2
    assert retention(0.0, 0.0) is None


def test_recovered_share_is_of_what_was_lost() -> None:
    assert recovered_share(0.5, 0.7, 0.9) == pytest.approx(0.5)
    assert recovered_share(0.5, 1.0, 0.9) == pytest.approx(1.25)
    assert recovered_share(0.5, 0.4, 0.9) == pytest.approx(-0.25)
    assert recovered_share(0.9, 0.95, 0.9) is None


def test_rates_are_compared_at_equal_effort_and_cache() -> None:
    def served(model: str, effort: Effort, rate: float, kv_cache: CacheDtype = "bf16") -> FrontierPoint:
        return FrontierPoint(Deployment(model, effort, kv_cache), rate, rate, 0.5)

    points = [served("parent", "low", 4), served("parent", "high", 2), served("parent", "high", 3, "fp8")]
    points += [served("child", "low", 6), served("child", "high", 6, "fp8")]
    assert rate_ratios(points, "child", "parent", "bf16") == {"low": 1.5}
    assert rate_ratios(points, "child", "parent", "fp8") == {"high": 2}


def test_gain_at_accuracy_takes_the_fastest_that_is_no_worse() -> None:
    points = [point(1, 0.9), point(3, 0.8), point(8, 0.5)]
    assert gain_at_accuracy(points, point(2, 0.8)) == 1.5
    assert gain_at_accuracy(points, point(2, 0.95)) is None

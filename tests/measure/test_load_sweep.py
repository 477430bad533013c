"""The arithmetic of a load sweep, in numbers a reader can check by hand; the Pareto set by its definition."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.measure.benchmark_serving.load_sweep import (
    Counts,
    Latency,
    LoadPoint,
    LoadRun,
    Spread,
    SweptPoint,
    best_point,
    compare_halves,
    find_contradictions,
    paired_ratios,
    pareto_set,
    summarize_runs,
)

POINT = LoadPoint("long", 100, 10, 4)
SERVER = {"requests": 15, "input_tokens": 1500, "output_tokens": 150}


def run(tokens_per_s: float = 50.0, itl_ms: float = 20.0) -> LoadRun:
    """12 measured requests of 10 tokens after 3 to warm up; 5 requests per second."""
    return LoadRun(
        counts=Counts(12, 1200, 120),
        warmup=Counts(3, 300, 30),
        errors=0,
        requests_per_s=tokens_per_s / 10,
        tokens_per_s=tokens_per_s,
        mean_output_tokens=10.0,
        ttft_ms=Latency(30.0, 28.0, 60.0),
        itl_ms=Latency(itl_ms, itl_ms, 2 * itl_ms),
        request_ms=Latency(10 * itl_ms, 10 * itl_ms, 15 * itl_ms),
    )


def swept(users: int, tokens_per_s: float, per_user: float) -> SweptPoint:
    return summarize_runs(replace(POINT, concurrency=users), [run(tokens_per_s, 1000 / per_user)])


def test_a_sound_run_has_no_contradiction() -> None:
    assert find_contradictions(POINT, 12, run(), SERVER) == []
    assert find_contradictions(POINT, 12, run(), {}) == []
    assert find_contradictions(POINT, 12, run(), {"requests": 15}) == []


@pytest.mark.parametrize(
    ("changed", "requests", "server", "said"),
    [
        ({}, 13, SERVER, "12 of 13 requests were answered, 0 failed"),
        ({"errors": 1}, 12, SERVER, "12 of 12 requests were answered, 1 failed"),
        ({"counts": Counts(12, 1200, 119)}, 12, {}, "12 requests of 10 output tokens had 119 of them in all"),
        ({"counts": Counts(12, 1100, 120)}, 12, {}, "12 requests of 100 input tokens had 1100 of them in all"),
        (
            {"requests_per_s": 5.01},
            12,
            SERVER,
            "is 5.01/s, but token throughput over mean output length is 50 / 10 = 5/s",
        ),
        ({}, 12, SERVER | {"requests": 16}, "the server counted 16 requests, the client 15"),
        ({}, 12, SERVER | {"output_tokens": 149}, "the server counted 149 output tokens, the client 150"),
        ({"mean_output_tokens": 0.0}, 12, SERVER, "50 / 0 = nan/s"),
    ],
)
def test_every_contradiction_is_named(
    changed: dict[str, object], requests: int, server: dict[str, int], said: str
) -> None:
    (found,) = find_contradictions(POINT, requests, replace(run(), **changed), server)
    assert said in found


def test_figures_over_repeats_are_median_smallest_and_largest() -> None:
    """Per-user speed is 10 tokens in 200, 250 and 100 ms."""
    found = summarize_runs(POINT, [run(50, 20), run(40, 25), run(80, 10)])
    assert found.tokens_per_s == Spread(50, 40, 80)
    assert found.requests_per_s == Spread(5, 4, 8)
    assert found.tokens_per_s_per_user == Spread(50, 40, 100)
    assert found.itl_ms["p99"] == Spread(40, 20, 50)
    assert found.ttft_ms["avg"] == Spread(30, 30, 30)


def test_ratios_pair_each_repeat_of_the_child_with_the_parents_before_it() -> None:
    """The machine slowed down by half in between: the ratio does not see it."""
    ratios = paired_ratios([run(50, 20), run(25, 40)], [run(60, 10), run(30, 20)])
    assert ratios["tokens_per_s"] == Spread(1.2, 1.2, 1.2)
    assert ratios["itl_ms"] == Spread(0.5, 0.5, 0.5)
    assert ratios["tokens_per_s_per_user"] == Spread(2, 2, 2)


def test_replies_in_one_piece_have_no_time_between_tokens_and_all_else() -> None:
    whole = replace(run(50, 20), itl_ms=Latency(0.0, 0.0, 0.0))
    assert find_contradictions(POINT, 12, whole, SERVER) == []
    ratios = paired_ratios([whole, run(50, 20)], [run(50, 10), run(50, 10)])
    assert "itl_ms" not in ratios
    assert ratios["tokens_per_s_per_user"] == Spread(2, 2, 2)


def test_the_best_configuration_is_of_the_highest_throughput_and_of_equals_the_fewest_users() -> None:
    points = [swept(1, 10, 100), swept(2, 20, 90), swept(4, 20, 60)]
    assert best_point(points).point.concurrency == 2


SPEEDS = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(SPEEDS, SPEEDS), min_size=1, max_size=8))
def test_the_pareto_set_is_what_no_other_point_beats(speeds: list[tuple[float, float]]) -> None:
    points = [swept(users + 1, *pair) for users, pair in enumerate(speeds)]
    kept = pareto_set(points)
    found = [(one.tokens_per_s.median, round(one.tokens_per_s_per_user.median)) for one in kept]
    unbeaten = {a for a in speeds if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in speeds)}
    assert set(found) == unbeaten
    assert len(found) == len(set(found))


def test_the_parent_agrees_with_itself_within_what_repeats_differ_by() -> None:
    """Two points whose repeats differ by 2 %, one whose second server was half as fast as its first."""
    steady = {replace(POINT, concurrency=users): [run(100), run(102)] for users in range(1, 9)}
    found = compare_halves(steady)
    assert all(half.agrees and half.ratio == pytest.approx(1.02) for half in found)
    odd = replace(POINT, concurrency=99)
    found = compare_halves(steady | {odd: [run(100), run(50)]}, [[run(100), run(101)]] * 20)
    assert {half.point: half.agrees for half in found} == dict.fromkeys(steady, True) | {odd: False}
    assert found[-1].ratio == pytest.approx(0.5)


def test_odd_and_even_repeats_are_the_halves() -> None:
    (half,) = compare_halves({POINT: [run(10), run(30), run(20)]})
    assert half.ratio == pytest.approx(30 / 15)

"""Paired differences, by hand and by simulation."""

from math import sqrt

import numpy as np
import pytest

from moesaic.core.errors import ArtifactError
from moesaic.measure.paired import Difference, Mean, Verdicts, average, difference, mcnemar, unpaired_difference


def verdicts(**tasks: str) -> Verdicts:
    """``add="110"``: three problems of ``add``, the first two solved."""
    return {task: {f"{task}-{place}": float(sign) for place, sign in enumerate(signs)} for task, signs in tasks.items()}


def test_the_suite_is_a_mean_over_tasks() -> None:
    """Two of four won in one task, one of two lost in the other: 50 and -50 points."""
    found = difference(verdicts(add="1111", hops="10"), verdicts(add="1100", hops="11"))
    assert (found.points, found.problems) == (0, 6)
    assert difference(verdicts(add="1111", hops="10"), verdicts(add="1101", hops="11")).points == (25 - 50) / 2


def test_mcnemars_p_value_by_hand() -> None:
    """One of six lost: 2 * (1 + 6) / 64."""
    assert mcnemar(5, 1) == mcnemar(1, 5) == 14 / 64
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(10, 0) == 2 / 1024


def test_the_interval_is_near_that_of_the_normal_distribution() -> None:
    """Of 1000 problems 60 are won and 30 lost: 3 points, with the variance of a mean of as many -1, 0 and 1."""
    found = difference(verdicts(add="1" * 60 + "0" * 940), verdicts(add="0" * 970 + "1" * 30))
    half = 196 * sqrt((0.09 - 0.03**2) / 1000)
    assert (found.low_points, found.high_points) == pytest.approx((3 - half, 3 + half), abs=0.15)
    assert found == difference(verdicts(add="1" * 60 + "0" * 940), verdicts(add="0" * 970 + "1" * 30))


def test_models_that_agree_everywhere_are_not_equal_for_certain() -> None:
    found = difference(verdicts(add="1" * 150, hops="0" * 150), verdicts(add="1" * 150, hops="0" * 150))
    assert (found.points, found.p_value, found.sign) == (0, 1, 0)
    assert -1.4 < found.low_points < -0.6
    assert 0.6 < found.high_points < 1.4


@pytest.mark.parametrize(("win", "loss"), [(0.004, 0.004), (0.02, 0.05), (0.12, 0.08)])
def test_intervals_hold_what_is_true(win: float, loss: float) -> None:
    """Six tasks of 50 problems, drawn 150 times; 95 % intervals, give or take what 150 draws leave open."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        drawn = generator.choice([-1.0, 0.0, 1.0], (6, 50), p=[loss, 1 - win - loss, win])
        won = {str(task): {str(place): d for place, d in enumerate(row)} for task, row in enumerate(drawn.tolist())}
        found = difference(won, {task: dict.fromkeys(row, 0.0) for task, row in won.items()})
        covered += found.low_points <= 100 * (win - loss) <= found.high_points
    assert covered >= 0.91 * 150


def test_means_alone_have_the_interval_of_the_normal_distribution() -> None:
    """Standard errors of 3 and 4 points make one of 5; two of these apart, p is 4.55 %."""
    found = unpaired_difference(Mean(0.5, 0.03), Mean(0.6, 0.04))
    assert (found.points, found.problems, found.paired) == (-10, 0, False)
    assert (found.low_points, found.high_points) == pytest.approx((-19.8, -0.2), abs=0.001)
    assert found.p_value == pytest.approx(0.0455, abs=0.0001)
    assert unpaired_difference(Mean(0.6, 0.04), Mean(0.6, 0.03)).p_value == 1


def test_an_unpaired_interval_is_the_wider_one_where_problems_are_hard_for_both() -> None:
    """Of 100 problems both solve the same half, but for one each."""
    model, other = verdicts(add="1" * 50 + "0" * 50), verdicts(add="1" * 49 + "01" + "0" * 49)
    means = unpaired_difference(Mean(0.5, 0.05), Mean(0.5, 0.05))
    paired = difference(model, other)
    assert means.points == paired.points == 0
    assert means.high_points > 2 * paired.high_points


def test_averages_pair_by_problem() -> None:
    """Over two efforts, or replies, a problem may be half solved."""
    both = average([verdicts(add="10"), verdicts(add="11")])
    assert both == {"add": {"add-0": 1.0, "add-1": 0.5}}
    assert difference(both, verdicts(add="10")).points == 25


def test_the_word_follows_from_the_interval() -> None:
    assert [Difference(1, low, high, 9, 1).sign for low, high in ((0.1, 2), (-2, -0.1), (-1, 1))] == [1, -1, 0]
    assert str(Difference(-0.34, -1.26, 0.5, 300, 0.4)) == "-0.3 [-1.3, +0.5]"


def test_other_problems_are_refused() -> None:
    for other in (verdicts(add="1"), verdicts(hops="11"), verdicts(add="11", hops="1")):
        with pytest.raises(ArtifactError, match="different problems"):
            difference(verdicts(add="11"), other)
    with pytest.raises(ArtifactError, match="different problems"):
        difference({}, {})
    with pytest.raises(ArtifactError, match="not all evaluations asked 'add-1'"):
        average([verdicts(add="11"), verdicts(add="1")])

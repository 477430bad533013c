"""Differences in accuracy between two models on the same problems: for the gate, the report and the records.

With s the share of correct replies to a problem, at one effort or over several::

    d          = s(model) - s(other)                                  of a problem
    difference = mean over tasks of the mean over their problems of d

The interval is of the paired bootstrap stratified by task (Efron and Tibshirani 1993, 16): problems are drawn anew
within their task, each with the replies of both models, and the 2.5 and 97.5 percentiles of the difference are taken.
A bootstrap alone takes what did not occur for impossible: two models that agree on every problem would be equal for
certain. So one win and one loss, spread evenly over the tasks, stand among what is drawn from (Bonett and Price 2012).

Where only the means of two models are known, they cannot be paired; their difference then has the interval and the
two-sided test of the normal distribution, its variance being the sum of the squared standard errors. That is wider
wherever both models find the same problems hard.

The test is McNemar's exact one: were the models equal, as many problems would be won as lost, so the wins among the
problems on which they differ are binomial with probability 1/2. Where s is a share of several replies, its sign counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, hypot
from statistics import NormalDist, fmean

import numpy as np

from moesaic.core.errors import ArtifactError

Verdicts = Mapping[str, Mapping[str, float]]
"""By task and the problem's id: the share of correct replies, 0 to 1."""

CONFIDENCE = 0.95
"""Of every interval."""
_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Difference:
    """How many points of accuracy a model is ahead of another, and what the choice of problems leaves open."""

    points: float
    low_points: float
    """The lower end of the interval."""
    high_points: float
    problems: int
    """On which the models were compared one by one; 0 if only their means were."""
    p_value: float
    """Of the two-sided test that the models are equal."""

    @property
    def paired(self) -> bool:
        """Whether the models were compared problem by problem."""
        return self.problems > 0

    @property
    def sign(self) -> int:
        """1 if the model is ahead, -1 if it is behind, 0 if the interval holds both."""
        return (self.low_points > 0) - (self.high_points < 0)

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low_points:+.1f}, {self.high_points:+.1f}]"


def difference(model: Verdicts, other: Verdicts) -> Difference:
    """Compare two models on the problems that both were asked.

    Raises:
        ArtifactError: if they were not asked the same problems, or none.
    """
    asked = {task: solved.keys() for task, solved in model.items()}
    if asked != {task: solved.keys() for task, solved in other.items()} or not any(asked.values()):
        raise ArtifactError(
            "two models are compared on different problems; evaluate both with the same config and data"
        )
    pairs = {task: [solved[id] - other[task][id] for id in solved] for task, solved in sorted(model.items())}
    low, high = np.quantile(_resampled(list(pairs.values())), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    every = [d for of_task in pairs.values() for d in of_task]
    return Difference(
        points=_in_points(fmean(fmean(of_task) for of_task in pairs.values())),
        low_points=_in_points(low),
        high_points=_in_points(high),
        problems=len(every),
        p_value=mcnemar(sum(d > 0 for d in every), sum(d < 0 for d in every)),
    )


@dataclass(frozen=True)
class Mean:
    """The accuracy of a model whose replies are not known problem by problem."""

    share: float
    """Of correct replies, 0 to 1."""
    standard_error: float
    """Over the choice of problems, as a share; greater than 0."""


def unpaired_difference(model: Mean, other: Mean) -> Difference:
    """Compare two models of which only the means are known."""
    apart, spread = model.share - other.share, hypot(model.standard_error, other.standard_error)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    return Difference(
        points=_in_points(apart),
        low_points=_in_points(apart - half),
        high_points=_in_points(apart + half),
        problems=0,
        p_value=2 * NormalDist().cdf(-abs(apart) / spread),
    )


def average(verdicts: Sequence[Verdicts]) -> Verdicts:
    """The mean share of correct replies to each problem, over several efforts or models.

    Raises:
        ArtifactError: if not all were asked the same problems.
    """
    first, *others = verdicts
    try:
        return {
            task: {id: fmean([share, *(other[task][id] for other in others)]) for id, share in solved.items()}
            for task, solved in first.items()
        }
    except KeyError as missing:
        raise ArtifactError(f"not all evaluations asked {missing}; use the same config and data for all") from missing


def accuracy(verdicts: Verdicts) -> float:
    """The mean over tasks of the mean over their problems."""
    return fmean(fmean(solved.values()) for solved in verdicts.values())


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p-value of so many problems won and lost, were either equally likely."""
    differing = wins + losses
    tail = sum(comb(differing, count) for count in range(min(wins, losses) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**differing)))


def _in_points(share: float) -> float:
    """Without the rounding of sums, which could put an end of an interval on the wrong side of 0."""
    return round(100 * float(share), 9)


def _resampled(pairs: Sequence[Sequence[float]]) -> np.ndarray:
    """The mean over tasks of the mean difference, for every resample; the same each time."""
    generator = np.random.default_rng(_SEED)
    total = np.zeros(_RESAMPLES)
    for of_task in pairs:
        values, places = np.unique([*of_task, 1.0, -1.0], return_inverse=True)
        weights = np.bincount(places, [1.0] * len(of_task) + [1 / len(pairs)] * 2)
        total += generator.multinomial(len(of_task), weights / weights.sum(), _RESAMPLES) @ values / len(of_task)
    return total / len(pairs)

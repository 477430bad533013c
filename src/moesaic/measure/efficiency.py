"""Request-level efficiency, accuracy retention and their frontier (paper A, its first figure).

    R(model, effort, kv) = T_max(model, kv) / N(model, effort)              [requests per second]

``T_max`` is the output-token throughput [tokens/s] of the model with that KV-cache type at one workload, in its best
configuration (here: the best batch size measured), and ``N`` the mean generated tokens per request over the evaluation
suite at that effort. The x axis of the frontier is ``R / R(parent, high, bf16)`` on the same hardware, its y axis the
suite-mean accuracy. A model that is faster per token but writes longer answers gains nothing per request.

    retention = accuracy(child) / accuracy(parent)

per effort over the suite, or of one task. Request-level efficiency is the ratio of two models' ``R``: at equal effort
(:func:`rate_ratios`), where the answers' quality may differ, or against a point of the parent's that the child is no
less accurate than (:func:`gain_at_accuracy`), where it may not. Departure: the paper's workload is 64K/64K tokens; ours
is whichever the benchmark measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moesaic.core.config import CacheDtype, Effort
from moesaic.core.errors import ConfigError


@dataclass(frozen=True)
class Deployment:
    """A served model: its name, its effort and its KV cache."""

    model: str
    effort: Effort
    kv_cache: CacheDtype = "bf16"


REFERENCE = Deployment("parent", "high", "bf16")
"""The deployment to which request rates are relative."""


@dataclass(frozen=True)
class Quality:
    """Accuracy and tokens per request of a deployment, over the suite."""

    accuracy: float
    """Mean over tasks, 0 to 1."""
    tokens_per_request: float
    """Mean generated tokens."""


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the paper's first figure."""

    deployment: Deployment
    requests_per_s: float
    relative_rate: float
    accuracy: float


def best_throughput(tokens_per_s: Iterable[float]) -> float:
    """``T_max``: the throughput of the best of the configurations measured."""
    measured = list(tokens_per_s)
    if not measured:
        raise ConfigError("no throughput was measured at this workload, so it has no best configuration")
    return max(measured)


def request_rate(max_tokens_per_s: float, tokens_per_request: float) -> float:
    """``R`` in requests per second."""
    if tokens_per_request <= 0:
        raise ConfigError(f"a request generates at least one token, got a mean of {tokens_per_request}")
    return max_tokens_per_s / tokens_per_request


def frontier_points(
    qualities: Mapping[Deployment, Quality],
    max_tokens_per_s: Mapping[tuple[str, CacheDtype], float],
    reference: Deployment = REFERENCE,
) -> list[FrontierPoint]:
    """Request rates of all deployments, relative to the reference's.

    Args:
        qualities: accuracy and tokens of every deployment; the reference must be among them.
        max_tokens_per_s: ``T_max`` per model and KV-cache type.
        reference: the deployment of relative rate 1.
    """
    if reference not in qualities:
        raise ConfigError(f"the reference {reference} was not evaluated, so rates cannot be relative to it")
    rates = {
        deployment: request_rate(max_tokens_per_s[deployment.model, deployment.kv_cache], quality.tokens_per_request)
        for deployment, quality in qualities.items()
    }
    return [
        FrontierPoint(deployment, rates[deployment], rates[deployment] / rates[reference], quality.accuracy)
        for deployment, quality in qualities.items()
    ]


def pareto_frontier(points: Iterable[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other beats in rate or accuracy without being worse in the other, slowest first."""
    frontier: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (-point.relative_rate, -point.accuracy)):
        if not frontier or point.accuracy > frontier[-1].accuracy:
            frontier.append(point)
    return frontier[::-1]


def rate_ratios(points: Iterable[FrontierPoint], model: str, over: str, kv_cache: CacheDtype) -> dict[Effort, float]:
    """Request rate of one model over another's at equal effort and KV cache, for the efforts that both have."""
    points = list(points)
    rates = {point.deployment: point.requests_per_s for point in points}
    efforts = [point.deployment.effort for point in points if point.deployment.model == over]
    return {
        effort: rates[Deployment(model, effort, kv_cache)] / rates[Deployment(over, effort, kv_cache)]
        for effort in dict.fromkeys(efforts)
        if {Deployment(name, effort, kv_cache) for name in (model, over)} <= rates.keys()
    }


def gain_at_accuracy(points: Iterable[FrontierPoint], goal: FrontierPoint) -> float | None:
    """Rate of the fastest point no less accurate than the goal, over the goal's; None if none is as accurate."""
    as_accurate = [point.requests_per_s for point in points if point.accuracy >= goal.accuracy]
    return max(as_accurate) / goal.requests_per_s if as_accurate else None


def retention(child_accuracy: float, parent_accuracy: float) -> float | None:
    """The child's accuracy over the parent's; None if the parent's is 0."""
    return child_accuracy / parent_accuracy if parent_accuracy > 0 else None


def recovered_share(before: float, after: float, parent: float) -> float | None:
    """The recovered share of the lost accuracy: ``(after - before) / (parent - before)``; None if none was lost."""
    return (after - before) / (parent - before) if before < parent else None

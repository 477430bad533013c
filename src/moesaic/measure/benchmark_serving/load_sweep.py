"""What a load sweep over an OpenAI-compatible server says (paper A, figures 4 and 5), and what must hold for it.

A closed loop of ``c`` users (the concurrency) keeps ``c`` requests in flight, each of ``i`` input and ``o`` output
tokens. A load client reports of one run

    request throughput = requests / duration,    token throughput = output tokens / duration,

latencies of requests, of their first token (TTFT) and between tokens (ITL), each as mean and percentiles. From these::

    per-user speed        = 1000 * mean output tokens / mean request latency [ms]   [tokens/s], waiting included
    best configuration    = the concurrency of the highest token throughput, T_max
    request-level rate    = T_max / mean output tokens            [requests/s]
    Pareto set            = points that no other beats in system throughput or per-user speed and matches in the other

Every figure is taken over repeats: median, smallest, largest. Repeats alternate between the models, each with a server
of its own, so the spread holds what restarts and drift of the machine do.

:func:`find_contradictions` checks a run against itself, its request and its server; a run that fails is no measurement.
:func:`compare_halves` holds the parent's odd repeats against its even ones: two measurements of the same thing, whose
ratio shows what a ratio of child and parent owes to chance. They agree if they differ by at most two standard errors.
The standard deviation of one repeat is pooled over all points and models, since a few repeats of one point say little.

Departure: AIPerf's own per-user throughput is the mean of every request's 1 / ITL. A fast engine's replies may arrive
in one packet, which leaves no time between tokens; the time from request to last token is always there, and is what a
user of a reasoning model waits for.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

_ROUNDING = 1e-6
"""Relative: client and server count the same things, so nothing but rounding may lie between their figures."""
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, order=True)
class LoadPoint:
    """One point of the sweep: a workload at a number of users."""

    workload: str
    input_tokens: int
    output_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles in milliseconds over the requests of a run."""

    avg: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Counts:
    """Requests answered, and the tokens read and generated for them."""

    requests: int
    input_tokens: int
    output_tokens: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


@dataclass(frozen=True)
class LoadRun:
    """One run of one point, as the client saw it."""

    counts: Counts
    """Counts of the measured requests."""
    warmup: Counts
    """Counts of the warm-up requests."""
    errors: int
    requests_per_s: float
    tokens_per_s: float
    """Throughput in output tokens, of all users together."""
    mean_output_tokens: float
    ttft_ms: Latency
    itl_ms: Latency
    request_ms: Latency

    @property
    def tokens_per_s_per_user(self) -> float:
        """Output tokens per second of one user, from the request to the last token."""
        return 1000 * self.mean_output_tokens / self.request_ms.avg


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of a figure over repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of these values."""
        values = list(values)
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class SweptPoint:
    """The figures of one model at one point, over its repeats."""

    point: LoadPoint
    tokens_per_s: Spread
    requests_per_s: Spread
    tokens_per_s_per_user: Spread
    ttft_ms: Mapping[str, Spread]
    """Keys of this and of all latencies: ``avg``, ``p50``, ``p99``."""
    itl_ms: Mapping[str, Spread]
    request_ms: Mapping[str, Spread]


@dataclass(frozen=True)
class Halves:
    """Odd and even repeats of the same point: two measurements of the same thing."""

    point: LoadPoint
    ratio: float
    """Mean token throughput of the even repeats over that of the odd ones."""
    agrees: bool


def find_contradictions(point: LoadPoint, requests: int, run: LoadRun, server: Mapping[str, int]) -> list[str]:
    """Messages for the figures of a run that contradict each other; empty if none do.

    Args:
        point: what was asked for.
        requests: how many of them.
        run: what the client reports.
        server: by how much the server's own counters rose meanwhile, warm-up included: as many of the fields of
            :class:`Counts` as it has.
    """
    contradictions = []
    if run.errors or run.counts.requests != requests:
        contradictions.append(f"{run.counts.requests} of {requests} requests were answered, {run.errors} failed")
    for what, total, each in (
        ("input", run.counts.input_tokens, point.input_tokens),
        ("output", run.counts.output_tokens, point.output_tokens),
    ):
        if total != each * run.counts.requests:
            contradictions.append(f"{run.counts.requests} requests of {each} {what} tokens had {total} of them in all")
    expected = run.tokens_per_s / run.mean_output_tokens if run.mean_output_tokens else math.nan
    if not math.isclose(run.requests_per_s, expected, rel_tol=_ROUNDING):
        contradictions.append(
            f"request throughput is {run.requests_per_s:.6g}/s, but token throughput over mean output length is "
            f"{run.tokens_per_s:.6g} / {run.mean_output_tokens:.6g} = {expected:.6g}/s"
        )
    client = run.counts + run.warmup
    for name, count in server.items():
        if count != getattr(client, name):
            contradictions.append(
                f"the server counted {count} {name.replace('_', ' ')}, the client {getattr(client, name)}"
            )
    return contradictions


def summarize_runs(point: LoadPoint, runs: Sequence[LoadRun]) -> SweptPoint:
    """Summarize all repeats of one point."""

    def latencies(name: str) -> dict[str, Spread]:
        return {key: Spread.of(getattr(getattr(run, name), key) for run in runs) for key in ("avg", "p50", "p99")}

    return SweptPoint(
        point=point,
        tokens_per_s=Spread.of(run.tokens_per_s for run in runs),
        requests_per_s=Spread.of(run.requests_per_s for run in runs),
        tokens_per_s_per_user=Spread.of(run.tokens_per_s_per_user for run in runs),
        ttft_ms=latencies("ttft_ms"),
        itl_ms=latencies("itl_ms"),
        request_ms=latencies("request_ms"),
    )


def best_point(points: Iterable[SweptPoint]) -> SweptPoint:
    """The point of ``T_max``, by medians; of equals the one of the lowest concurrency."""
    return max(points, key=lambda swept: (swept.tokens_per_s.median, -swept.point.concurrency))


def pareto_set(points: Iterable[SweptPoint]) -> list[SweptPoint]:
    """The points no other beats in one without losing in the other, highest throughput first, by medians."""
    kept: list[SweptPoint] = []
    for swept in sorted(points, key=lambda one: (-one.tokens_per_s.median, -one.tokens_per_s_per_user.median)):
        if not kept or swept.tokens_per_s_per_user.median > kept[-1].tokens_per_s_per_user.median:
            kept.append(swept)
    return kept


def paired_ratios(parent: Sequence[LoadRun], child: Sequence[LoadRun]) -> dict[str, Spread]:
    """Child over parent at one point, each repeat of the child against the parent's before it; latencies are means.

    There is no ratio of the time between tokens where some replies of the parent arrived in one piece.
    """
    pairs = [(_figures(old), _figures(new)) for old, new in zip(parent, child, strict=True)]
    known = [name for name in pairs[0][0] if all(old[name] for old, _ in pairs)]
    return {name: Spread.of(new[name] / old[name] for old, new in pairs) for name in known}


def _figures(run: LoadRun) -> dict[str, float]:
    return {
        "tokens_per_s": run.tokens_per_s,
        "requests_per_s": run.requests_per_s,
        "tokens_per_s_per_user": run.tokens_per_s_per_user,
        "ttft_ms": run.ttft_ms.avg,
        "itl_ms": run.itl_ms.avg,
        "request_ms": run.request_ms.avg,
    }


def compare_halves(
    runs: Mapping[LoadPoint, Sequence[LoadRun]], others: Iterable[Sequence[LoadRun]] = ()
) -> list[Halves]:
    """Compare odd with even repeats at every point.

    Args:
        runs: all repeats of one model, in the order of time; at least two each.
        others: repeats of other models, which say more of the spread.
    """
    deviation = _pooled_deviation([*runs.values(), *others])
    halves = []
    for point, repeats in runs.items():
        odd, even = ([run.tokens_per_s for run in repeats[start::2]] for start in (0, 1))
        allowed = _STANDARD_ERRORS * deviation * math.sqrt(1 / len(odd) + 1 / len(even))
        ratio = fmean(even) / fmean(odd)
        halves.append(Halves(point, ratio, abs(math.log(ratio)) <= allowed))
    return halves


def _pooled_deviation(groups: Sequence[Sequence[LoadRun]]) -> float:
    """Standard deviation of the logarithm of one repeat's token throughput, around its own point's mean."""
    squares, freedom = 0.0, 0
    for runs in groups:
        logs = [math.log(run.tokens_per_s) for run in runs]
        squares += sum((value - fmean(logs)) ** 2 for value in logs)
        freedom += len(logs) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0

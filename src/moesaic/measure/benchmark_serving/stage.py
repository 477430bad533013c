"""Serves parent and child in turns and sweeps over numbers of users with AIPerf: throughput, time to first token, time
between tokens, request latency. Nothing else should run on the device meanwhile.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from moesaic.core.config import Amount, Config, EmulatedCache, Positive, Precision, ServingEngine
from moesaic.core.stage import Stage, artifact, model


class SweptWorkload(Config):
    """A kind of request, and the numbers of users that send it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """What plots call it, such as ``long`` or ``short``."""
    input_tokens: Positive
    """Prompt tokens of one request."""
    output_tokens: Annotated[int, Field(ge=2)]
    """Generated tokens of one request; between one token and the next lies the user's speed."""
    concurrencies: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Users, each with one request in flight."""


class BenchmarkServingConfig(Config):
    """Throughput and latency of parent and child through an OpenAI-compatible server (paper A, figures 4 and 5)."""

    engine: ServingEngine = "moesaic"
    """``moesaic serve``; ``trtllm-serve`` or ``vllm serve`` on export bundles; or servers that are running."""
    workloads: Annotated[tuple[SweptWorkload, ...], Field(min_length=1)] = (
        SweptWorkload(name="short", input_tokens=128, output_tokens=32),
        SweptWorkload(name="long", input_tokens=2048, output_tokens=32),
    )
    """What is sent."""
    requests_per_user: Positive = 4
    """Requests that every user sends at a point, one after another."""
    warmup_requests_per_user: Annotated[int, Field(ge=0)] = 1
    """Before those, unmeasured."""
    repeats: Annotated[int, Field(ge=2)] = 3
    """Sweeps of each model, each on a fresh server, in turns: parent, child, parent, child."""
    more_repeats: Annotated[int, Field(ge=0)] = 2
    """Further sweeps, of those points alone at which the parent differs from itself by more than its spread."""
    parent_kv_cache: EmulatedCache = "bf16"
    """What the parent's KV cache holds: ``moesaic`` emulates it; any other server must have been set up so."""
    child_kv_cache: EmulatedCache = "bf16"
    """What the child's holds."""
    precision: Precision = "float32"
    """What the models compute in under ``moesaic``."""
    startup_timeout_s: Amount = 1800.0
    """A server must answer within this."""
    point_timeout_s: Amount = 7200.0
    """The client must be done with one point within this."""
    seed: int = 0
    """For the prompts."""

    @model_validator(mode="after")
    def _each_point_once(self) -> Self:
        names = [workload.name for workload in self.workloads]
        if len(set(names)) < len(names):
            raise ValueError(f"workloads have the names {names}; each needs its own")
        for workload in self.workloads:
            if len(set(workload.concurrencies)) < len(workload.concurrencies):
                raise ValueError(f"workload {workload.name!r} names a concurrency twice: {workload.concurrencies}")
        return self


STAGE = Stage(
    name="benchmark_serving",
    config=BenchmarkServingConfig,
    runtime="serve",
    inputs=(
        model("parent", "the one to beat, or an export bundle of it"),
        model("child", "the one that should, or an export bundle of it"),
    ),
    outputs=(
        artifact("serving", "`measurements.json`: figures over repeats, best configurations, Pareto sets, ratios"),
    ),
    alone=True,
)

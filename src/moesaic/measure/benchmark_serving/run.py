"""Speed of parent and child as clients see it: AIPerf against an OpenAI-compatible server of each, in turns.

Every repeat starts a fresh server of the parent, sweeps over all points, stops it, and does the same with the child
(parent, child, parent, child, ...), so that a machine that slows down slows both. A run that contradicts itself, its
request or its server stops the stage, see :mod:`moesaic.measure.benchmark_serving.load_sweep`. Points at which the
parent does not agree with itself are measured again. A point that is done is a file in scratch, and a killed stage goes
on with the next one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.files import write_text_atomically
from moesaic.core.progress import count_steps
from moesaic.deploy.engines import Server, ServerSpec, check_available, running_url, started_server
from moesaic.measure.benchmark_serving.aiperf import Client, Load, check_certificates, find_client
from moesaic.measure.benchmark_serving.load_sweep import (
    LoadPoint,
    LoadRun,
    SweptPoint,
    best_point,
    compare_halves,
    find_contradictions,
    paired_ratios,
    pareto_set,
    summarize_runs,
)
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig
from moesaic.models.checkpoint import Checkpoint

PAYLOAD = "measurements.json"
ROLES = ("parent", "child")
Sweep = Mapping[LoadPoint, Sequence[LoadRun]]
"""The runs of every point in the order of time."""


@dataclass(frozen=True)
class ServerRun:
    """One run of a model's server, over all points."""

    spec: ServerSpec
    repeat: int

    def file(self, scratch: Path, point: LoadPoint) -> Path:
        """The file that keeps the measurement of a point."""
        return scratch / f"{self.spec.role}-{self.repeat}-{point.workload}-{point.concurrency}.json"


@dataclass(frozen=True)
class Measured:
    """The measurement of one point in one run."""

    run: LoadRun
    server: Mapping[str, int]
    """The increase of the server's own counters, warm-up included."""

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Read what :meth:`write` wrote."""
        return TypeAdapter(cls).validate_json(path.read_text())

    def write(self, path: Path) -> None:
        """Write the measurement to a file, atomically."""
        write_text_atomically(path, json.dumps(asdict(self)) + "\n")


def run(config: BenchmarkServingConfig, *, parent: Path, child: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``measurements.json``."""
    points = list_points(config)
    specs = [_spec(config, points, *model) for model in zip(ROLES, (parent, child), strict=True)]
    models = [Checkpoint.open(spec.directory) for spec in specs]
    for model in models:
        check_positions(model, points)
    vocab_size = min(model.shape.vocab_size for model in models)
    for spec in specs:
        check_available(config.engine, spec)
        if config.engine == "running":
            check_certificates(running_url(spec.role))
    sweeping = Sweeping(config, find_client(), vocab_size, scratch)
    sweeping.measure(specs, range(config.repeats), points)
    measured = sweeping.read(specs, points)
    for repeat in range(config.repeats, config.repeats + config.more_repeats):
        if not (unsettled := _unsettled(measured)):
            break
        sweeping.measure(specs, [repeat], unsettled)
        measured = sweeping.read(specs, points)
    sweeps = {role: _runs(by_point) for role, by_point in measured.items()}
    content = {
        "engine": config.engine,
        "client": {"name": "aiperf", "version": sweeping.client.version},
        "kv_cache": {spec.role: spec.kv_cache for spec in specs},
        "repeats": config.repeats,
        "counted_by_server": sorted(measured["parent"][points[0]][0].server),
        **describe(sweeps),
    }
    (output / PAYLOAD).write_text(json.dumps(content, indent=1) + "\n")
    return _metrics(content)


def _runs(measured: Mapping[LoadPoint, Sequence[Measured]]) -> Sweep:
    return {point: [one.run for one in repeats] for point, repeats in measured.items()}


def _unsettled(measured: Mapping[str, Mapping[LoadPoint, Sequence[Measured]]]) -> list[LoadPoint]:
    """The points at which the parent differs from itself by more than what repeats differ by."""
    parent, child = (_runs(measured[role]) for role in ROLES)
    return [half.point for half in compare_halves(parent, child.values()) if not half.agrees]


def list_points(config: BenchmarkServingConfig) -> list[LoadPoint]:
    """Every workload at every concurrency."""
    return [
        LoadPoint(workload.name, workload.input_tokens, workload.output_tokens, users)
        for workload in config.workloads
        for users in workload.concurrencies
    ]


def _spec(config: BenchmarkServingConfig, points: Sequence[LoadPoint], role: str, directory: Path) -> ServerSpec:
    return ServerSpec(
        role=role,
        directory=directory.absolute(),
        kv_cache=config.parent_kv_cache if role == "parent" else config.child_kv_cache,
        precision=config.precision,
        max_requests=max(point.concurrency for point in points),
        max_cache_tokens=max(point.concurrency * (point.input_tokens + point.output_tokens) for point in points),
    )


def check_positions(checkpoint: Checkpoint, points: Sequence[LoadPoint]) -> None:
    """Raise ConfigError if a request is longer than a model's positions."""
    longest = max(points, key=lambda point: point.input_tokens + point.output_tokens)
    if longest.input_tokens + longest.output_tokens > checkpoint.shape.max_positions:
        raise ConfigError(
            f"{longest.input_tokens} input and {longest.output_tokens} output tokens of workload {longest.workload!r} "
            f"do not fit the {checkpoint.shape.max_positions} positions of {checkpoint.directory}; shorten them"
        )


@dataclass(frozen=True)
class Sweeping:
    """What all server runs of a stage share."""

    config: BenchmarkServingConfig
    client: Client
    vocab_size: int
    scratch: Path

    def measure(self, specs: Sequence[ServerSpec], repeats: Sequence[int], points: Sequence[LoadPoint]) -> None:
        """Measure what has no file yet: every point, on a fresh server of each model in turns."""
        server_runs = [ServerRun(spec, repeat) for repeat in repeats for spec in specs]
        with count_steps(len(server_runs) * len(points), "benchmark_serving") as advance:
            for server_run in server_runs:
                self._measure_missing(server_run, points, advance)

    def read(
        self, specs: Sequence[ServerSpec], points: Sequence[LoadPoint]
    ) -> dict[str, dict[LoadPoint, list[Measured]]]:
        """By role and point, in the order of time, the repeats that were measured with every model."""
        measured: dict[str, dict[LoadPoint, list[Measured]]] = {spec.role: {p: [] for p in points} for spec in specs}
        for point in points:
            for repeat in range(self.config.repeats + self.config.more_repeats):
                files = {spec.role: ServerRun(spec, repeat).file(self.scratch, point) for spec in specs}
                if all(file.is_file() for file in files.values()):
                    for role, file in files.items():
                        measured[role][point].append(Measured.read(file))
        return measured

    def _measure_missing(
        self, server_run: ServerRun, points: Sequence[LoadPoint], advance: Callable[[int], None]
    ) -> None:
        """Measure the points that have no file yet, and report every point to ``advance``."""
        config, files = self.config, {point: server_run.file(self.scratch, point) for point in points}
        missing = [point for point in points if not files[point].is_file()]
        advance(len(points) - len(missing))
        if not missing:
            return
        log = self.scratch / f"server-{server_run.spec.role}-{server_run.repeat}.log"
        with started_server(config.engine, server_run.spec, log, config.startup_timeout_s) as server:
            for point in missing:
                users = point.concurrency
                load = Load(
                    point=point,
                    requests=users * config.requests_per_user,
                    warmup_requests=users * config.warmup_requests_per_user,
                    vocab_size=self.vocab_size,
                    seed=config.seed,
                )
                artifacts = files[point].with_suffix("")
                _measure(self.client, server, load, artifacts, config.point_timeout_s).write(files[point])
                advance(1)


def _measure(client: Client, server: Server, load: Load, artifacts: Path, timeout_s: float) -> Measured:
    """Measure one point; StageError unless client and server agree on the counts."""
    before = server.counts()
    try:
        run = client.run(server.url, server.model, load, artifacts, timeout_s, server.key)
    finally:
        server.check_alive()
    after = server.counts()
    counted = {field: count - before.get(field, 0) for field, count in after.items()}
    if wrong := find_contradictions(load.point, load.requests, run, counted):
        raise StageError(f"the run of {load.point} against {server.model} does not hold: " + "; ".join(wrong))
    return Measured(run, counted)


def describe(sweeps: Mapping[str, Sweep]) -> dict[str, Any]:
    """The figures of ``measurements.json``.

    Args:
        sweeps: of the parent and the child, by role, at the same points.
    """
    swept_points = {role: [summarize_runs(*item) for item in sweep.items()] for role, sweep in sweeps.items()}
    parent, child = (sweeps[role] for role in ROLES)
    return {
        "points": [_entry(role, swept) for role in ROLES for swept in swept_points[role]],
        "ratios": [
            asdict(point)
            | {name: asdict(spread) for name, spread in paired_ratios(parent[point], child[point]).items()}
            for point in parent
        ],
        "best": [_best(role, group) for role in ROLES for group in _by_workload(swept_points[role])],
        "pareto": [_pareto(role, group) for role in ROLES for group in _by_workload(swept_points[role])],
        "parent_twice": [
            asdict(half.point) | {"ratio": half.ratio, "agrees": half.agrees}
            for half in compare_halves(parent, child.values())
        ],
    }


def _entry(role: str, swept: SweptPoint) -> dict[str, Any]:
    figures = asdict(swept)
    return {"model": role, **figures.pop("point"), **figures}


def _by_workload(points: Sequence[SweptPoint]) -> list[list[SweptPoint]]:
    names = dict.fromkeys(swept.point.workload for swept in points)
    return [[swept for swept in points if swept.point.workload == name] for name in names]


def _best(role: str, group: Sequence[SweptPoint]) -> dict[str, Any]:
    best = best_point(group)
    figures = {"tokens_per_s": best.tokens_per_s.median, "requests_per_s": best.requests_per_s.median}
    return {"model": role, **asdict(best.point), **figures}


def _pareto(role: str, group: Sequence[SweptPoint]) -> dict[str, Any]:
    users = sorted(swept.point.concurrency for swept in pareto_set(group))
    return {"model": role, "workload": group[0].point.workload, "concurrencies": users}


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for point in content["points"]:
        suffix = f"{point['workload']}_c{point['concurrency']}"
        metrics[f"{point['model']}_tokens_per_s_{suffix}"] = point["tokens_per_s"]["median"]
    for ratio in content["ratios"]:
        metrics[f"speedup_{ratio['workload']}_c{ratio['concurrency']}"] = ratio["tokens_per_s"]["median"]
    best = {(entry["model"], entry["workload"]): entry["tokens_per_s"] for entry in content["best"]}
    for workload in dict.fromkeys(name for _, name in best):
        metrics[f"best_speedup_{workload}"] = best["child", workload] / best["parent", workload]
    metrics["parent_agrees_share"] = sum(half["agrees"] for half in content["parent_twice"]) / len(
        content["parent_twice"]
    )
    return metrics

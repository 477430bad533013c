"""Results of NeMo Evaluator: ``results.yml`` of its containers, and the bundles of its own benchmarks.

``results.yml`` was read from the source of nemo-evaluator 0.2.6 and 0.2.8 (``core/evaluate.py``,
``api/api_dataclasses.py``): tasks, their metrics, and of these scores with statistics. It has means only, and says
neither which way is better nor in which unit: scores are taken for accuracies, and for percent if one of the task is
above 1. NeMo-Skills leaves a row for every reply in ``eval-results/**/output*.jsonl``, a file for every repeat; a score
whose name is a field there, and whose value is the mean of it, is known problem by problem.

``eval-*.json`` beside ``results.jsonl`` was read from the source of 0.4.0 and 0.5.0rc0 (``engine/artifacts.py``,
``engine/eval_loop.py``, ``metrics/headline.py``): one row per problem and repeat, with its reward. The mean over
repeats is the share of correct replies. How replies were generated stands in ``full_config.yaml`` of the run, if
anywhere.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from pydantic import ConfigDict, Field

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import read_text
from moesaic.measure.outside.results import (
    FromHarness,
    Score,
    Task,
    digest,
    flat,
    number_of,
    parse,
    read_lines,
    sort_scores,
)
from moesaic.measure.paired import accuracy

YAML, BUNDLE, ROWS, CONFIG = "results.yml", "eval-*.json", "results.jsonl", "full_config.yaml"
REPLIES = "eval-results/**/output*.jsonl"
_COUNTS = {"avg_tokens", "gen_seconds", "no_answer", "num_entries"}
"""Scores of NeMo-Skills that are no accuracies."""
_CHANGING = {"payload_modifier", "reasoning", "system_message"}
"""Interceptors that change what is asked or read."""
_EXECUTION = {"max_concurrent", "max_system_retries", "name", "sandbox", "skip_failed", "timeout"}
_HEADLINES = ("pass@1", "mean_reward")
_ROUNDING = 1e-4
_NO_YAML = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML raises beside its own errors, where a scalar is not what its tag says."""


class _Score(FromHarness):
    value: float
    stats: dict[str, Any] = Field(default_factory=dict)


class _Metric(FromHarness):
    scores: dict[str, _Score] = Field(default_factory=dict)


class _Measured(FromHarness):
    metrics: dict[str, _Metric] = Field(default_factory=dict)


class _All(FromHarness):
    tasks: dict[str, _Measured] | None = None
    groups: dict[str, _Measured] | None = None


class _Run(FromHarness):
    type: str | None = None
    params: dict[str, Any] | None = None


class _Endpoint(FromHarness):
    model_id: str | None = None
    type: str | None = None
    adapter_config: dict[str, Any] | None = None


class _Target(FromHarness):
    api_endpoint: _Endpoint = _Endpoint()


class _Yaml(FromHarness):
    config: _Run
    target: _Target
    results: _All
    git_hash: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def version(self) -> str:
        """The version of nemo-evaluator, where it is recorded."""
        versions = (self.metadata or {}).get("versioning")
        return str(versions.get("nemo_evaluator", "")) if isinstance(versions, Mapping) else ""


def read_yaml(path: Path) -> list[Task]:
    """The tasks and groups of one ``results.yml``, of which only means are known.

    Raises:
        ArtifactError: if it is damaged.
    """
    content = parse(_Yaml, _load_yaml(path), path)
    endpoint, params = content.target.api_endpoint, dict(content.config.params or {})
    settings = {
        "version of the harness": content.version or None,
        "revision of the container": content.git_hash or None,
        "benchmark": content.config.type,
        "endpoint": endpoint.type,
        **flat(params),
        **flat(_interceptors(endpoint.adapter_config)),
    }
    harness = f"NeMo Evaluator {content.version}".strip()
    measured = {**(content.results.groups or {}), **(content.results.tasks or {})}
    if not measured:
        raise ArtifactError(f"{path} has no results; the evaluation did not finish")
    replies = sorted(path.parent.glob(REPLIES)) if len(measured) == 1 else []
    solved, files = _read_replies(replies), (path, *replies)
    return [
        _read_task(name, of, settings, harness, endpoint.model_id or "", solved, files) for name, of in measured.items()
    ]


def _interceptors(adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    every = (adapter or {}).get("interceptors")
    rows = [row for row in every if isinstance(row, Mapping)] if isinstance(every, list) else []
    return {str(row["name"]): row.get("config") for row in rows if row.get("name") in _CHANGING}


def _read_task(
    name: str,
    measured: _Measured,
    settings: Mapping[str, Any],
    harness: str,
    model: str,
    solved: Mapping[str, Mapping[str, float]],
    files: tuple[Path, ...],
) -> Task:
    every = {
        f"{metric}/{score}": entry for metric, of in measured.metrics.items() for score, entry in of.scores.items()
    }
    left_out = {label: "no accuracy" for label in every if label.rpartition("/")[2] in _COUNTS}
    kept = {label: entry for label, entry in every.items() if label not in left_out}
    unit = 100 if any(1 < entry.value <= 100 for entry in kept.values()) else 1
    found = {}
    for label, entry in kept.items():
        error, shares = number_of(entry.stats.get("stderr")), solved.get(label.rpartition("/")[2])
        agrees = shares and isclose(accuracy({name: shares}), entry.value / unit, abs_tol=_ROUNDING)
        verdicts = {name: shares} if shares and agrees else None
        found[label] = Score(entry.value / unit, None if error is None else error / unit, verdicts)
    scores, left_out = sort_scores(left_out, found)
    return Task(name, harness, model, {**settings, "unit": f"1/{unit}"}, scores, left_out, files)


class _Reply(FromHarness):
    model_config = ConfigDict(extra="allow")

    problem: Any = None
    question: Any = None
    expected_answer: Any = None


def _read_replies(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """By field the share of correct replies to every problem, of fields that say of each reply whether it is."""
    verdicts: dict[str, dict[str, list[bool]]] = {}
    for path in paths:
        seen = Counter[str]()
        for number, line in enumerate(read_lines(path), 1):
            reply = parse(_Reply, line, f"{path}, line {number}")
            problem = digest(reply.problem, reply.question, reply.expected_answer)
            seen[problem] += 1
            for field, value in (reply.model_extra or {}).items():
                if isinstance(value, bool):
                    of = verdicts.setdefault(field, {}).setdefault(f"{problem} {seen[problem]}", [])
                    of.append(value)
    complete = {field: of for field, of in verdicts.items() if all(len(every) == len(paths) for every in of.values())}
    return {field: {problem: fmean(every) for problem, every in of.items()} for field, of in complete.items()}


class _Benchmark(FromHarness):
    name: str
    repeats: int = 1
    scores: dict[str, Any]


class _Bundle(FromHarness):
    benchmark: _Benchmark
    config: dict[str, Any]
    sdk_version: str = ""
    num_results: int = Field(alias="n_results")


class _Row(FromHarness):
    problem_idx: int
    repeat: int
    reward: float
    prompt: Any = None
    expected_answer: Any = None


def read_bundle(path: Path) -> list[Task]:
    """The benchmark of one ``eval-*.json``, with the rewards beside it.

    A bundle that was only converted from a container's ``results.yml`` has no task of its own.

    Raises:
        ArtifactError: if a file is damaged, or the rewards are not those that the bundle is about.
    """
    content, rows = parse(_Bundle, read_text(path), path), path.with_name(ROWS)
    if content.config.get("framework") == "container":
        return []
    rewards = _read_rewards(rows, content)
    name = content.benchmark.name
    solved = {problem: sum(of) / len(of) for problem, of in rewards.items()}
    label = next((one for one in _HEADLINES if one in content.benchmark.scores), None)
    if label is None:
        raise ArtifactError(f"{path} has neither of the scores {', '.join(_HEADLINES)}; the evaluation did not finish")
    value = content.benchmark.scores[label]
    said = number_of(value.get("value")) if isinstance(value, Mapping) else None
    mean = accuracy({name: solved})
    if said is None or not isclose(said, mean, abs_tol=_ROUNDING):
        raise ArtifactError(
            f"{path} says {label} is {said}, and {rows.name} has a mean of {mean:.4f}; give one run's files"
        )
    shares = all(0 <= share <= 1 for share in solved.values())
    scores, left_out = sort_scores(
        {} if shares else {label: "rewards are no shares"}, {label: Score(mean, None, {name: solved})}
    )
    generation, files = _generation(path, name)
    settings = {
        "version of the harness": content.sdk_version,
        "repeats": content.benchmark.repeats,
        **flat({key: content.config.get(key) for key in ("max_problems", "scorers", "shuffle", "system_prompt")}),
        **generation,
    }
    harness, model = f"NeMo Evaluator {content.sdk_version}", str(content.config.get("model", ""))
    return [Task(name, harness, model, settings, scores, left_out, (path, rows, *files))]


def _read_rewards(path: Path, content: _Bundle) -> dict[str, list[float]]:
    """Of every problem the rewards of its repeats; a problem is its number, prompt and answer."""
    rewards: dict[str, dict[int, float]] = {}
    for number, line in enumerate(read_lines(path), 1):
        row = parse(_Row, line, f"{path}, line {number}")
        of = rewards.setdefault(f"{row.problem_idx} {digest(row.prompt, row.expected_answer)}", {})
        if row.repeat in of:
            raise ArtifactError(f"{path}, line {number} has problem {row.problem_idx} again; give the file of one run")
        of[row.repeat] = row.reward
    found = sum(map(len, rewards.values()))
    if not found or found != content.num_results:
        raise ArtifactError(
            f"{path} holds {found} of {content.num_results} replies; give the files of one finished run"
        )
    if any(len(of) != content.benchmark.repeats for of in rewards.values()):
        raise ArtifactError(
            f"{path} does not hold {content.benchmark.repeats} replies to every problem; finish the run"
        )
    return {problem: list(of.values()) for problem, of in rewards.items()}


class _Config(FromHarness):
    services: dict[str, dict[str, Any]] = Field(default_factory=dict)
    benchmarks: list[dict[str, Any]] = Field(default_factory=list)


def _generation(bundle: Path, name: str) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Settings of a benchmark in the run's config, and its file; nothing if there is none."""
    path = bundle.parent.parent / CONFIG
    if not path.is_file():
        return {"generation": "not recorded"}, ()
    config = parse(_Config, _load_yaml(path), path)
    for entry in config.benchmarks:
        if entry.get("name") == name or len(config.benchmarks) == 1:
            solver = entry.get("solver")
            solver = dict(solver) if isinstance(solver, Mapping) else {}
            service = config.services.get(str(solver.pop("service", "")), {})
            asked = {key: value for key, value in entry.items() if key not in _EXECUTION} | {"solver": solver}
            return flat(asked) | flat({key: service.get(key) for key in ("generation", "protocol", "proxy")}), (path,)
    return {"generation": "not recorded"}, (path,)


def _load_yaml(path: Path) -> Any:
    """As JSON would hold it: without dates, keys that are no text, and nodes that contain themselves."""
    try:
        return json.loads(json.dumps(yaml.safe_load(read_text(path)), default=str))
    except (yaml.YAMLError, *_NO_YAML) as broken:
        first = str(broken).splitlines()[0] if str(broken) else type(broken).__name__
        raise ArtifactError(f"{path} is not valid YAML: {first}; give the file as the harness wrote it") from broken

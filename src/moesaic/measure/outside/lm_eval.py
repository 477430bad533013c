"""Results of lm-evaluation-harness: ``results_DATE.json``, and ``samples_TASK_DATE.jsonl`` of ``--log_samples``.

Read from the source of versions 0.4.12 and 0.4.13.dev0 (``loggers/evaluation_tracker.py``, ``evaluator.py``,
``result_schema.py``). A row of samples is a problem under one filter, with the value of every metric; of several
replies to a problem (``repeats``) the filter makes one value. A problem is known by its number and the hashes of
document and target. The mean of a metric over the rows must be what ``results`` says; where it is not, as in a
corpus-wide F1, the metric has no value per problem, and only its mean and standard error count.
"""

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

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
    share_of,
    sort_scores,
)
from moesaic.measure.paired import Verdicts, accuracy

RESULTS = "results_*.json"
_TASK_SETTINGS = (
    *("dataset_path", "dataset_name", "test_split", "validation_split", "fewshot_split", "description"),
    *("target_delimiter", "fewshot_delimiter", "output_type", "generation_kwargs", "repeats", "filter_list"),
)
_RUN_SETTINGS = ("limit", "gen_kwargs", "fewshot_seed")
_MODEL = {"dtype", "engine", "model", "path", "peft", "pretrained", "quantization", "revision"}
"""Arguments that name the model itself."""


class _Count(FromHarness):
    effective: int


class _Results(FromHarness):
    results: dict[str, dict[str, Any]]
    groups: dict[str, Any] = Field(default_factory=dict)
    group_subtasks: dict[str, list[str]] = Field(default_factory=dict)
    configs: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    num_fewshot: dict[str, Any] = Field(alias="n-shot")
    num_samples: dict[str, _Count] = Field(alias="n-samples")
    higher_is_better: dict[str, dict[str, bool | None]]
    config: dict[str, Any]
    lm_eval_version: str
    model_name: str
    chat_template_sha: str | None = None
    system_instruction_sha: str | None = None
    fewshot_as_multiturn: bool | None = None

    def tasks_of(self, group: str) -> list[str]:
        """The tasks of a group, those of groups in it too."""
        within = [*self.group_subtasks.get(group, ())]
        for name in within:
            within += [one for one in self.group_subtasks.get(name, ()) if one not in within]
        return within


class _Sample(FromHarness):
    model_config = ConfigDict(extra="allow")

    doc_id: int
    doc_hash: str
    target_hash: str
    prompt_hash: str
    filter: str
    metrics: list[str]


def read(path: Path) -> list[Task]:
    """The tasks and groups of one ``results_DATE.json``; the tasks of a group that has a score stand for it alone.

    Raises:
        ArtifactError: if a file is damaged, or holds other problems than the results count.
    """
    content = parse(_Results, read_text(path), path)
    date = path.stem.removeprefix("results_")
    samples = {file.name: file for file in path.parent.glob("samples_*.jsonl")}
    tasks = {
        name: _read_task(content, name, path, samples.get(f"samples_{name}_{date}.jsonl"))
        for name in content.results
        if name not in content.groups and name not in content.group_subtasks
    }
    groups = [_read_group(content, name, path, tasks) for name in content.groups if name in content.results]
    inside = {name for group in content.groups for name in content.tasks_of(group)}
    return [task for task in (*groups, *tasks.values()) if task.name not in inside]


def _read_task(content: _Results, name: str, path: Path, samples: Path | None) -> Task:
    settings, found, files = _settings(content, name), {}, [path]
    if samples is not None:
        counted = content.num_samples.get(name)
        shares, settings["problems and prompts"] = _read_samples(samples, 0 if counted is None else counted.effective)
        found = {label: {name: of} for label, of in shares.items()}
        files.append(samples)
    scores, left_out = _scores(content, name, found)
    return Task(name, _harness(content), content.model_name, settings, scores, left_out, tuple(files))


def _read_samples(path: Path, expected: int) -> tuple[dict[str, dict[str, float]], str]:
    """By metric the share of every problem, and what stands for all prompts.

    A metric with a value that is no share, such as a pair or a list, is absent.
    """
    solved: dict[str, dict[str, float | None]] = {}
    prompts: dict[str, dict[str, str]] = {}
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}, line {number}"
        sample = parse(_Sample, line, place)
        problem = f"{sample.doc_id} {digest(sample.doc_hash, sample.target_hash)}"
        if problem in prompts.setdefault(sample.filter, {}):
            raise ArtifactError(f"{place} has problem {sample.doc_id} again; give the file of one run")
        prompts[sample.filter][problem] = sample.prompt_hash
        for metric in sample.metrics:
            value = share_of((sample.model_extra or {}).get(metric))
            solved.setdefault(_label(metric, sample.filter), {})[problem] = value
    asked = next(iter(prompts.values()), {})
    if len(asked) < expected or any(of != asked for of in prompts.values()):
        raise ArtifactError(
            f"{path} holds {min(map(len, prompts.values()), default=0)} of {expected} problems under one filter, "
            "or others under another; give the whole file of one run"
        )
    return {label: shares for label, of in solved.items() if (shares := _complete(of))}, digest(*sorted(asked.items()))


def _complete(of: Mapping[str, float | None]) -> dict[str, float] | None:
    shares = {problem: value for problem, value in of.items() if value is not None}
    return shares if len(shares) == len(of) else None


def _scores(content: _Results, name: str, found: Mapping[str, Verdicts]) -> tuple[dict[str, Score], dict[str, str]]:
    """The scores in ``results`` of a task or group, each with its verdicts if their mean is what it says."""
    scores, left_out = {}, {}
    for key, value in content.results[name].items():
        metric, comma, filter = key.rpartition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        label = _label(metric, filter)
        if content.higher_is_better.get(name, {}).get(metric) is not True:
            left_out[label] = "less is better, or the harness does not say what is"
        elif (mean := number_of(value)) is not None:
            error = number_of(content.results[name].get(f"{metric}_stderr,{filter}"))
            verdicts = found.get(label)
            agrees = verdicts is not None and isclose(accuracy(verdicts), mean, abs_tol=1e-6)
            scores[label] = Score(mean, error, verdicts if agrees else None)
        else:
            left_out[label] = "no number"
    return sort_scores(left_out, scores)


def _read_group(content: _Results, name: str, path: Path, tasks: Mapping[str, Task]) -> Task:
    """A group: its problems are those of all its tasks, if the harness weighted these by their size, as by default."""
    members = [tasks[one] for one in content.tasks_of(name) if one in tasks]
    found = {
        label: {name: {f"{task} {id}": share for task, of in by_task.items() for id, share in of.items()}}
        for label in dict.fromkeys(label for one in members for label in one.scores)
        if len(by_task := {one.name: of for one in members if (of := _own_shares(one, label))}) == len(members)
    }
    scores, left_out = _scores(content, name, found)
    settings = {f"{one.name}.{key}": value for one in members for key, value in one.settings.items()}
    files = tuple(dict.fromkeys([path, *(file for one in members for file in one.files)]))
    return Task(name, _harness(content), content.model_name, settings, scores, left_out, files)


def _own_shares(task: Task, label: str) -> Mapping[str, float] | None:
    score = task.scores.get(label)
    return None if score is None or score.verdicts is None else score.verdicts[task.name]


def _label(metric: str, filter: str) -> str:
    return metric if filter == "none" else f"{metric}/{filter}"


def _harness(content: _Results) -> str:
    return f"lm-evaluation-harness {content.lm_eval_version}"


def _settings(content: _Results, name: str) -> dict[str, Any]:
    config = content.configs.get(name, {})
    counted = content.num_samples.get(name)
    return {
        "version of the harness": content.lm_eval_version,
        "backend": content.config.get("model"),
        "version of the task": content.versions.get(name),
        "few-shot examples": content.num_fewshot.get(name),
        "problems": counted and counted.effective,
        "chat template": content.chat_template_sha,
        "system instruction": content.system_instruction_sha,
        "few-shots as turns": content.fewshot_as_multiturn,
        **flat({key: config.get(key) for key in _TASK_SETTINGS}),
        **flat({key: content.config.get(key) for key in _RUN_SETTINGS}),
        **flat(_arguments(content.config.get("model_args")), "model_args"),
    }


def _arguments(given: Any) -> dict[str, Any]:
    """Arguments of the model, from a mapping or ``a=b,c=d``, without those that name it."""
    if isinstance(given, str):
        given = dict(part.partition("=")[::2] for part in given.split(",") if part)
    return {key: value for key, value in given.items() if key not in _MODEL} if isinstance(given, Mapping) else {}

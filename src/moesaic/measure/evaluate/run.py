"""Accuracy and generated tokens per request on verifiable problems, per task and reasoning effort.

The model replies in this process or through a server. Prompts, which are rendered here, and verifiers are the same, and
so is what is written. Replies of a server are kept in files of ``batch_size`` in scratch, each there only when it is
whole: a killed run asks again for what its missing files would hold.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.core.config import Effort
from moesaic.core.files import write_text_atomically
from moesaic.core.json_text import read_json_object
from moesaic.core.progress import track
from moesaic.data.chat import decode_reply, load_tokenizer
from moesaic.data.problems import Problem, first_of_each_task, problems_digest, read_problems, render_prompt
from moesaic.deploy.engines.completions import Completion
from moesaic.deploy.engines.served_replies import served_replies, whole_chunks
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.models import kv_cache, layout
from moesaic.models.checkpoint import Checkpoint, read_recovery
from moesaic.models.generation import Generated, Sampling, check_lengths, generate_batches, seed_of, stop_ids
from moesaic.models.loading import choose_device
from moesaic.models.whole_model import load_model
from moesaic.search.prune_model.run import PRUNING

_FIGURES = ("accuracy", "tokens_per_request", "truncated")


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``: a problem, the model's reply, and whether it is correct."""

    id: str
    task: str
    effort: str
    output: str
    correct: bool
    tokens: int
    truncated: bool
    epoch: int = 1
    """The number of the reply to this problem at this effort, from 1."""


@dataclass(frozen=True)
class Request:
    """A request to a server for one reply."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    epoch: int
    """The number of the reply to this problem at this effort, from 1."""


@dataclass(frozen=True)
class Chunk:
    """Requests of one effort whose samples are kept in one file."""

    effort: Effort
    requests: tuple[Request, ...]
    file: Path


Answered = Iterator[tuple[Effort, list[Sample]]]
"""The samples of each effort, one effort after another."""


def run(config: EvaluateConfig, *, model: Path, tests: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``evaluation.json`` and ``samples.jsonl``; an effort that a killed run had finished is not repeated."""
    checkpoint = Checkpoint.open(model)
    config = config.model_copy(update={"name": config.name or _candidate(model)})
    problems = first_of_each_task(read_problems(tests), config.problems_per_task)
    files = {effort: scratch / f"samples-{effort}.jsonl" for effort in config.efforts}
    missing = [effort for effort, file in files.items() if not file.is_file()]
    if config.engine == "in_process":
        answered = _answer_here(config, checkpoint, problems, missing)
    else:
        answered = _answer_by_server(config, checkpoint, problems, missing, scratch)
    for effort, judged in answered:
        _write_samples(files[effort], judged)
    samples = {effort: _read_samples(file) for effort, file in files.items()}
    evaluation: dict[str, Any] = {
        "name": config.name,
        "steps": read_recovery(model),
        "kv_cache": config.kv_cache,
        "parameters": layout.num_parameters(checkpoint.shape, checkpoint.architecture),
        "problems": {"split": config.split, "count": len(problems), "digest": problems_digest(problems)},
        "efforts": {effort: summarize(judged) for effort, judged in samples.items()},
    }
    _write_samples(output / "samples.jsonl", [sample for judged in samples.values() for sample in judged])
    (output / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    return _metrics(evaluation["efforts"])


def _answer_here(
    config: EvaluateConfig, checkpoint: Checkpoint, problems: Sequence[Problem], efforts: Sequence[Effort]
) -> Answered:
    scales = kv_cache.scales_for(config.kv_cache, checkpoint)
    tokenizer = load_tokenizer(checkpoint.directory)
    if efforts:
        model = _load(checkpoint.directory, config, scales)
        for effort in efforts:
            yield effort, answer_problems(model, tokenizer, problems, effort, config)


def _load(model: Path, config: EvaluateConfig, scales: Sequence[kv_cache.KvScales]) -> PreTrainedModel:
    """The model, with the KV cache that the config asks for."""
    loaded = load_model(model, getattr(torch, config.precision)).to(choose_device())
    if config.kv_cache is not None:
        kv_cache.emulate(loaded, kv_cache.roundings(config.kv_cache, scales))
    return loaded


def _answer_by_server(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    problems: Sequence[Problem],
    efforts: Sequence[Effort],
    scratch: Path,
) -> Answered:
    """Ask one server for the replies at all efforts at once."""
    if not efforts:
        return
    if config.engine == "moesaic":
        kv_cache.scales_for(config.kv_cache, checkpoint)
    tokenizer = load_tokenizer(checkpoint.directory)
    chunks = [chunk for effort in efforts for chunk in _plan(config, problems, tokenizer, effort, scratch)]
    missing = [chunk for chunk in chunks if not chunk.file.is_file()]
    if missing:
        _ask_server(config, checkpoint, tokenizer, missing, scratch)
    for effort in efforts:
        yield effort, [sample for chunk in chunks if chunk.effort == effort for sample in _read_samples(chunk.file)]


def _plan(
    config: EvaluateConfig,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    effort: Effort,
    scratch: Path,
) -> list[Chunk]:
    requests = [
        Request(problem, prompt, epoch)
        for problem in problems
        for prompt in [tuple(render_prompt(problem, tokenizer, effort))]
        for epoch in range(1, config.epochs + 1)
    ]
    parts = [tuple(requests[start : start + config.batch_size]) for start in range(0, len(requests), config.batch_size)]
    return [Chunk(effort, part, scratch / f"samples-{effort}-{number:06d}.jsonl") for number, part in enumerate(parts)]


def _ask_server(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    chunks: Sequence[Chunk],
    scratch: Path,
) -> None:
    """Write each chunk when its last reply arrives; lengths are checked before the server starts."""
    requests = [(chunk.effort, request) for chunk in chunks for request in chunk.requests]
    wanted = [_completion(config, effort, request) for effort, request in requests]
    check_lengths([one.prompt for one in wanted], config.max_new_tokens, checkpoint.shape.max_positions)
    with served_replies(config, checkpoint.directory, config.kv_cache, wanted, scratch) as replies:
        samples = (
            (index, replace(judge(request.problem, reply, tokenizer, effort), epoch=request.epoch))
            for index, reply in track(replies, len(wanted), f"{config.name}: replies")
            for effort, request in [requests[index]]
        )
        for number, judged in whole_chunks(samples, [len(chunk.requests) for chunk in chunks]):
            _write_samples(chunks[number].file, judged)


def _completion(config: EvaluateConfig, effort: str, request: Request) -> Completion:
    """The completion to request; its seed belongs to this problem and epoch alone."""
    seed = seed_of("evaluate", config.seed, effort, request.problem.id, request.epoch - 1)
    return Completion(request.problem.id, request.prompt_ids, config.max_new_tokens, config.temperature, seed)


def answer_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    effort: str,
    config: EvaluateConfig,
) -> list[Sample]:
    """Generate the replies to all problems at one effort and judge them."""
    asked = [(problem, epoch + 1) for problem in problems for epoch in range(config.epochs)]
    prompts = [render_prompt(problem, tokenizer, effort) for problem, _ in asked]
    sampling = Sampling(config.max_new_tokens, stop_ids(model), config.temperature, config.seed)
    batches = generate_batches(model, prompts, sampling, config.batch_size)
    num_batches = -(-len(prompts) // config.batch_size)
    replies = dict(chain.from_iterable(track(batches, num_batches, f"{config.name}: batches at {effort} effort")))
    return [
        replace(judge(problem, replies[index], tokenizer, effort), epoch=epoch)
        for index, (problem, epoch) in enumerate(asked)
    ]


def judge(problem: Problem, reply: Generated, tokenizer: PreTrainedTokenizerBase, effort: str) -> Sample:
    """Decode a reply and compare its final channel with the answer."""
    text = str(tokenizer.decode(reply.token_ids, skip_special_tokens=False))
    correct = problem.is_solved_by_reply(decode_reply(reply.token_ids, tokenizer), reply.truncated)
    return Sample(problem.id, problem.task, effort, text, correct, reply.num_tokens, reply.truncated)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """The entry of one effort in ``evaluation.json``; the suite's figures are means over its tasks.

    ``solved`` is by problem the share of replies that are correct, so that models can be compared problem by problem.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        of_task = [sample for sample in samples if sample.task == task]
        tasks[task] = {
            "accuracy": fmean(sample.correct for sample in of_task),
            "tokens_per_request": fmean(sample.tokens for sample in of_task),
            "truncated": fmean(sample.truncated for sample in of_task),
            "solved": {
                id: fmean(sample.correct for sample in replies)
                for id, replies in groupby(of_task, key=lambda sample: sample.id)
            },
        }
    suite = {key: fmean(task[key] for task in tasks.values()) for key in _FIGURES}
    return {**suite, "tasks": tasks}


def _metrics(efforts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for effort, result in efforts.items():
        for key in _FIGURES:
            metrics[f"{key}_{effort}"] = result[key]
        for task, figures in result["tasks"].items():
            metrics[f"accuracy_{effort}_{task}"] = figures["accuracy"]
    return metrics


def _candidate(model: Path) -> str:
    """The name a pruned checkpoint carries in its ``pruning.json``."""
    record = model / PRUNING
    return str(read_json_object(record).get("candidate")) if record.is_file() else "parent"


def _write_samples(path: Path, samples: Iterable[Sample]) -> None:
    write_text_atomically(path, "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))


def _read_samples(path: Path) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]

"""Accuracy and generated tokens per request on verifiable problems, per task and reasoning effort."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic import gpt_oss, kv_cache
from moesaic.blocks import choose_device
from moesaic.chat import load_tokenizer
from moesaic.checkpoint import Checkpoint, read_recovery
from moesaic.configs import EvaluateConfig
from moesaic.generation import Generated, Sampling, generate_batches, stop_ids
from moesaic.gpt_oss_puzzle import load_model
from moesaic.problems import Problem, first_of_each_task, read_problems, render_prompt
from moesaic.progress import track
from moesaic.stages.prune_model import PRUNING
from moesaic.verifiers import split_reply

_FIGURES = ("accuracy", "tokens_per_request", "truncated")


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``: a problem and what the model made of it."""

    id: str
    task: str
    effort: str
    output: str
    correct: bool
    tokens: int
    truncated: bool


def run(config: EvaluateConfig, *, model: Path, tests: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``evaluation.json`` and ``samples.jsonl``; an effort that a killed run had finished is not repeated."""
    checkpoint = Checkpoint.open(model)
    config = config.model_copy(update={"name": config.name or _candidate(model)})
    scales = kv_cache.read_scales(checkpoint) if config.kv_cache == "fp8" else [kv_cache.UNIT] * checkpoint.num_layers
    problems = first_of_each_task(read_problems(tests), config.problems_per_task)
    tokenizer = load_tokenizer(model)
    loaded: PreTrainedModel | None = None
    samples: dict[str, list[Sample]] = {}
    for effort in config.efforts:
        finished = scratch / f"samples-{effort}.jsonl"
        if not finished.is_file():
            loaded = loaded or _load(model, config, scales)
            _write_samples(finished, answer_problems(loaded, tokenizer, problems, effort, config))
        samples[effort] = _read_samples(finished)
    evaluation: dict[str, Any] = {
        "name": config.name,
        "steps": read_recovery(model),
        "kv_cache": config.kv_cache,
        "parameters": gpt_oss.num_parameters(checkpoint.shape, checkpoint.architecture),
        "efforts": {effort: summarize(found) for effort, found in samples.items()},
    }
    _write_samples(output / "samples.jsonl", [sample for found in samples.values() for sample in found])
    (output / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    return _metrics(evaluation["efforts"])


def _load(model: Path, config: EvaluateConfig, scales: Sequence[kv_cache.KvScales]) -> PreTrainedModel:
    """The model, with the KV cache that the config asks for."""
    loaded = load_model(model, getattr(torch, config.precision)).to(choose_device())
    if config.kv_cache is not None:
        kv_cache.emulate(loaded, kv_cache.roundings(config.kv_cache, scales))
    return loaded


def answer_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    effort: str,
    config: EvaluateConfig,
) -> list[Sample]:
    """Let the model reply to every problem at one effort, and judge the replies."""
    prompts = [render_prompt(problem, tokenizer, effort) for problem in problems]
    sampling = Sampling(config.max_new_tokens, stop_ids(model), config.temperature, config.seed)
    batches = generate_batches(model, prompts, sampling, config.batch_size)
    num_batches = -(-len(prompts) // config.batch_size)
    found = dict(chain.from_iterable(track(batches, num_batches, f"{config.name}: batches at {effort} effort")))
    return [judge(problem, found[index], tokenizer, effort) for index, problem in enumerate(problems)]


def judge(problem: Problem, reply: Generated, tokenizer: PreTrainedTokenizerBase, effort: str) -> Sample:
    """Decode a reply and hold its final channel against the answer."""
    text = str(tokenizer.decode(reply.token_ids, skip_special_tokens=False))
    correct = not reply.truncated and problem.is_solved_by(split_reply(text).final)
    return Sample(problem.id, problem.task, effort, text, correct, reply.num_tokens, reply.truncated)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """What ``evaluation.json`` says of one effort; the suite's figures are means over its tasks."""
    tasks: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        found = [sample for sample in samples if sample.task == task]
        tasks[task] = {
            "accuracy": fmean(sample.correct for sample in found),
            "tokens_per_request": fmean(sample.tokens for sample in found),
            "truncated": fmean(sample.truncated for sample in found),
            "problems": len(found),
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
    return str(json.loads(record.read_text())["candidate"]) if record.is_file() else "parent"


def _write_samples(path: Path, samples: Iterable[Sample]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    partial.rename(path)


def _read_samples(path: Path) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in path.read_text().splitlines()]

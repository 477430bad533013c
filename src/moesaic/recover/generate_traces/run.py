"""Let the parent answer prompts: the traces that distillation learns from, and how long and how right they are.

Prompts go through the model in chunks of ``batch_size``. A chunk is one file in scratch, there only when it is whole;
what is sampled in it depends on the seed, the effort and its number alone. So a killed run repeats one chunk at most,
and its output is the same, byte for byte, as that of a run that was not killed.

A server gets the requests of all chunks one after another, ``batch_size`` at once: no chunk waits for the longest reply
of another. Each request has a seed of its own. How far a seed decides the reply depends on the server.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.files import write_text_atomically
from moesaic.core.progress import track
from moesaic.data.chat import decode_reply, load_tokenizer
from moesaic.data.problems import Problem, read_problems, render_prompt, spread_over_tasks
from moesaic.deploy.engines.completions import Completion
from moesaic.deploy.engines.served_replies import served_replies, whole_chunks
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import Generated, Sampling, check_lengths, generate, seed_of, stop_ids
from moesaic.models.loading import choose_device
from moesaic.models.whole_model import load_model
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.generate_traces.traces import Trace, read_traces

TRACES = "traces.jsonl"
"""The replies to learn from, see ``moesaic.recover.generate_traces.traces``."""
SUMMARY = "summary.json"
"""Per effort, and there per task, what the parent did on all prompts, replies that are not handed on included."""


@dataclass(frozen=True)
class Request:
    """One reply to generate."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    held_out: bool
    number: int
    """Which of the replies to this prompt at this effort."""


@dataclass(frozen=True)
class Chunk:
    """Requests of one effort that are generated together and kept in one file."""

    effort: str
    number: int
    requests: tuple[Request, ...]

    @property
    def file_name(self) -> str:
        """What its traces are called in scratch."""
        return f"traces-{self.effort}-{self.number:06d}.jsonl"


def run(config: GenerateTracesConfig, *, model: Path, prompts: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``traces.jsonl`` and ``summary.json``; chunks that a killed run had finished are not repeated."""
    checkpoint = Checkpoint.open(model)
    problems = spread_over_tasks(read_problems(prompts), config.max_prompts)
    chunks = _plan(problems, load_tokenizer(model), config)
    requests = [request for chunk in chunks for request in chunk.requests]
    prompt_ids, names = [request.prompt_ids for request in requests], [request.problem.id for request in requests]
    check_lengths(prompt_ids, config.max_new_tokens, checkpoint.shape.max_positions, names)
    missing = [chunk for chunk in chunks if not (scratch / chunk.file_name).is_file()]
    if config.engine == "in_process":
        _answer_here(missing, model, scratch, config)
    else:
        _answer_by_server(missing, model, scratch, config)
    replies = [trace for chunk in chunks for trace in read_traces(scratch / chunk.file_name)]
    kept = [trace for trace in replies if config.keep_truncated or not trace.truncated]
    _check_split(kept)
    summary: dict[str, dict[str, Any]] = {effort: _summarize(effort, replies, kept) for effort in config.efforts}
    _write_traces(output / TRACES, kept)
    (output / SUMMARY).write_text(json.dumps({"efforts": summary}, indent=1) + "\n")
    return _metrics(summary, kept)


def choose_held_out(ids: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """The share of the prompts, and at least one, whose ids hash lowest with the seed.

    Raises:
        ArtifactError: if there is no prompt left to train on.
    """
    if len(ids) < 2:
        raise ArtifactError(f"{len(ids)} prompt is too few: one is held out for evaluation, others are trained on")
    number = min(max(1, round(share * len(ids))), len(ids) - 1)
    return frozenset(sorted(ids, key=lambda name: seed_of("held out", seed, name))[:number])


def _plan(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, config: GenerateTracesConfig) -> list[Chunk]:
    held_out = choose_held_out([problem.id for problem in problems], config.held_out_share, config.seed)
    chunks = []
    for effort in config.efforts:
        requests = [
            Request(problem, prompt, problem.id in held_out, number)
            for problem in problems
            for prompt in [tuple(render_prompt(problem, tokenizer, effort))]
            for number in range(config.samples_per_prompt)
        ]
        for number, start in enumerate(range(0, len(requests), config.batch_size)):
            chunks.append(Chunk(effort, number, tuple(requests[start : start + config.batch_size])))
    return chunks


def _answer_here(chunks: Sequence[Chunk], model: Path, scratch: Path, config: GenerateTracesConfig) -> None:
    if chunks:
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, getattr(torch, config.precision)).to(choose_device())
        for chunk in track(chunks, len(chunks), "chunks of traces"):
            _write_traces(scratch / chunk.file_name, _answer(chunk, loaded, tokenizer, config))


def _answer(
    chunk: Chunk, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateTracesConfig
) -> Iterator[Trace]:
    """The parent's replies to one chunk, verified."""
    seed = seed_of("sampling", config.seed, chunk.effort, chunk.number)
    sampling = Sampling(config.max_new_tokens, stop_ids(model), config.temperature, seed)
    replies = generate(model, [request.prompt_ids for request in chunk.requests], sampling, config.batch_size)
    for request, reply in zip(chunk.requests, replies, strict=True):
        yield _trace(request, reply, tokenizer, chunk.effort)


def _answer_by_server(chunks: Sequence[Chunk], model: Path, scratch: Path, config: GenerateTracesConfig) -> None:
    """Write the chunks as their last replies come in."""
    if not chunks:
        return
    tokenizer = load_tokenizer(model)
    requests = [(chunk.effort, request) for chunk in chunks for request in chunk.requests]
    wanted = [_completion(config, effort, request) for effort, request in requests]
    with served_replies(config, model, None, wanted, scratch) as replies:
        traces = (
            (place, _trace(request, reply, tokenizer, effort))
            for place, reply in track(replies, len(wanted), "traces")
            for effort, request in [requests[place]]
        )
        for number, chunk in whole_chunks(traces, [len(chunk.requests) for chunk in chunks]):
            _write_traces(scratch / chunks[number].file_name, chunk)


def _completion(config: GenerateTracesConfig, effort: str, request: Request) -> Completion:
    seed = seed_of("reply", config.seed, effort, request.problem.id, request.number)
    return Completion(request.problem.id, request.prompt_ids, config.max_new_tokens, config.temperature, seed)


def _trace(request: Request, reply: Generated, tokenizer: PreTrainedTokenizerBase, effort: str) -> Trace:
    text = decode_reply(reply.token_ids, tokenizer)
    return Trace(
        id=request.problem.id,
        task=request.problem.task,
        effort=effort,
        prompt_ids=request.prompt_ids,
        reply_ids=reply.token_ids,
        correct=request.problem.is_solved_by_reply(text, reply.truncated),
        truncated=reply.truncated,
        held_out=request.held_out,
    )


def _check_split(kept: Sequence[Trace]) -> None:
    for held_out, purpose in ((False, "train on"), (True, "evaluate on")):
        if not any(trace.held_out == held_out for trace in kept):
            raise ConfigError(
                f"no trace is left to {purpose}: all such replies are truncated; raise max_new_tokens, use more "
                f"prompts or set keep_truncated"
            )


def _summarize(effort: str, replies: Sequence[Trace], kept: Sequence[Trace]) -> dict[str, Any]:
    """Means over all replies of one effort, and how many of them are handed on."""
    rows = [trace for trace in replies if trace.effort == effort]
    tasks = {task: [trace for trace in rows if trace.task == task] for task in sorted({trace.task for trace in rows})}
    return {
        **_means(rows),
        "traces": sum(trace.effort == effort for trace in kept),
        "tasks": {task: _means(members) for task, members in tasks.items()},
    }


def _means(replies: Sequence[Trace]) -> dict[str, float]:
    return {
        "accuracy": fmean(trace.correct for trace in replies),
        "tokens_per_request": fmean(len(trace.reply_ids) for trace in replies),
        "truncated": fmean(trace.truncated for trace in replies),
    }


def _metrics(summary: Mapping[str, Mapping[str, Any]], kept: Sequence[Trace]) -> dict[str, float]:
    metrics = {
        f"{key}_{effort}": float(value)
        for effort, figures in summary.items()
        for key, value in figures.items()
        if key != "tasks"
    }
    return metrics | {
        "traces": float(len(kept)),
        "traces_held_out": float(sum(trace.held_out for trace in kept)),
        "tokens": float(sum(len(trace.token_ids) for trace in kept)),
        "reply_tokens": float(sum(len(trace.reply_ids) for trace in kept)),
    }


def _write_traces(path: Path, traces: Iterable[Trace]) -> None:
    write_text_atomically(path, "".join(f"{trace.to_json()}\n" for trace in traces))

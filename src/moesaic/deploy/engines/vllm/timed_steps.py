"""Runs in vLLM's own environment: loads several bundles at once and times the engine's steps on each in turn.

    python timed_steps.py REQUEST.json ANSWER.json

It imports nothing of Moesaic. Every bundle has an engine in a process of its own, a fork of one that has imported the
engine; only one of them works at a time.
"""

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

_CONNECTOR = {"kv_connector": "FilledCache", "kv_connector_module_path": "filled_cache", "kv_role": "kv_both"}
"""The module beside this one, by the names that the engine imports it by."""
_LEAST_MS = 200.0
"""What is timed for a number, at least: the median of shorter readings counts."""
_PROCESSES = multiprocessing.get_context("forkserver")


def start(arguments: list[str]) -> tuple[Any, Callable[[], float]]:
    """An engine with its own arguments, and a clock in milliseconds."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args([*arguments, "--kv-transfer-config", json.dumps(_CONNECTOR)])
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(given))
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    seconds = time.thread_time if alone else time.perf_counter  # the first stands still while others have the core
    return engine, lambda: 1e3 * seconds()


def time_prompts(engine: Any, now_ms: Callable[[], float], job: dict[str, Any]) -> float:
    """Milliseconds until every prompt has been read and has its first token; short ones are read again and again."""
    elapsed: list[float] = []
    while sum(elapsed) < _LEAST_MS:
        _add(engine, job, 1, filled=False)
        began = now_ms()
        while engine.has_unfinished_requests():
            engine.step()
        elapsed.append(now_ms() - began)
    return median(elapsed)


def time_decoding(engine: Any, now_ms: Callable[[], float], job: dict[str, Any]) -> float:
    """Milliseconds of one step that appends a token to each of the requests; the median over steps.

    Raises:
        RuntimeError: if the engine cannot work on all of them at once.
    """
    elapsed: list[float] = []
    while sum(elapsed) < _LEAST_MS:
        _add(engine, job, job["num_steps"] + 1, filled=True)
        elapsed += _step_times(engine, now_ms, job["num_requests"])[1:]
    return median(elapsed)


def _step_times(engine: Any, now_ms: Callable[[], float], num_requests: int) -> list[float]:
    elapsed = []
    while engine.has_unfinished_requests():
        began = now_ms()
        outputs = engine.step()
        elapsed.append(now_ms() - began)
        if len(outputs) < num_requests:
            raise RuntimeError(f"the KV cache has room for {len(outputs)} of {num_requests} requests")
    return elapsed


_TIMED = {"prefill": time_prompts, "decode": time_decoding}


def _add(engine: Any, job: dict[str, Any], max_tokens: int, filled: bool) -> None:
    """Give the engine requests of random tokens, the same ones every time."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_transfer_params": {"filled": filled}},
    )
    chosen = random.Random(job["num_tokens"])
    for index in range(job["num_requests"]):
        prompt = chosen.choices(range(job["vocab_size"]), k=job["num_tokens"])
        engine.add_request(f"{time.monotonic_ns()}-{index}", {"prompt_token_ids": prompt}, greedy)


def serve(arguments: list[str], asked: Connection) -> None:
    """Start an engine, say which one it is, and time what is asked for until nobody asks."""
    import torch
    import vllm

    engine, now_ms = start(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    asked.send({"version": vllm.__version__, "device": device})
    with suppress(EOFError):
        while job := asked.recv():
            asked.send(_TIMED[job["phase"]](engine, now_ms, job))


class Engine:
    """An engine in a process of its own, which ends with this one."""

    def __init__(self, arguments: list[str]) -> None:
        self._asking, asked = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=serve, args=(arguments, asked))
        self._process.start()
        asked.close()
        self.about: dict[str, str] = self._asking.recv()

    def time(self, job: dict[str, Any]) -> float:
        """Milliseconds of a job; EOFError if the engine is gone."""
        self._asking.send(job)
        found: float = self._asking.recv()
        return found

    def stop(self) -> None:
        """Let it end."""
        self._asking.close()
        self._process.join()


def main(request: Path, answer: Path) -> None:
    """Time every job on every engine, the engines taking turns so that a slow machine slows all of them alike."""
    wanted = json.loads(request.read_text())
    try:
        answer.write_text(json.dumps(time_all(**wanted)))
    except EOFError:
        sys.exit("an engine has ended; what it said stands above")


def time_all(arguments: list[list[str]], jobs: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """What :func:`main` answers: the engine's version and device, and milliseconds by engine, job and repeat."""
    _PROCESSES.set_forkserver_preload(["vllm.v1.engine.llm_engine", "vllm.engine.arg_utils"])
    engines = [Engine(each) for each in arguments]
    times: list[list[list[float]]] = [[[] for _ in jobs] for _ in engines]
    for repeat in range(repeats + 1):
        for index, job in enumerate(jobs):
            for which in range(len(engines)) if repeat % 2 else reversed(range(len(engines))):
                ms = engines[which].time(job)
                if repeat:  # the first round warms up
                    times[which][index].append(ms)
    about = engines[0].about
    for engine in engines:
        engine.stop()
    return {**about, "times": times}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

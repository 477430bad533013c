"""One run of AIPerf against one server at one point of a sweep.

AIPerf gets whole request bodies (its ``inputs_json`` data set), so that nothing is left to it: the prompt is token ids,
exactly as many as the point says and never twice the same, and the reply ends after exactly as many as the point says.
Tokens are counted by the server (``--use-server-token-count``): a client that splits text into tokens again counts
others. AIPerf insists on a tokenizer all the same, and gets one of a single word. No cache of it outlives the run.
"""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.child_processes import last_lines, tethered
from moesaic.core.errors import StageError
from moesaic.core.own_environment import own_variables, program_version
from moesaic.measure.benchmark_serving.aiperf.environment import AIPERF
from moesaic.measure.benchmark_serving.aiperf.export import EXPORT, read_export
from moesaic.measure.benchmark_serving.load_sweep import LoadPoint, LoadRun

_TOKENIZER = {
    "tokenizer.json": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
}
"""The files of a tokenizer with a vocabulary of one word."""


@dataclass(frozen=True)
class Load:
    """The requests that the client sends at a point."""

    point: LoadPoint
    requests: int
    """The number of measured requests."""
    warmup_requests: int
    """The number of requests before those, not measured."""
    vocab_size: int
    """Prompts are random tokens of the whole vocabulary."""
    seed: int


@dataclass(frozen=True)
class Client:
    """An installed AIPerf: its program and version."""

    program: Path
    version: str

    def run(
        self, url: str, model: str, load: Load, artifacts: Path, timeout_s: float, key: str | None = None
    ) -> LoadRun:
        """Put the load on the server and return what AIPerf reports.

        Args:
            url: of the server, without ``/v1``.
            model: what the server calls the model.
            load: what to send.
            artifacts: a directory for what AIPerf reads and writes; what an earlier run left there is removed.
            timeout_s: how long it may take.
            key: what the server asks for; AIPerf takes it on its command line alone.

        Raises:
            StageError: if it fails or takes longer, with the end of its output.
        """
        shutil.rmtree(artifacts, ignore_errors=True)
        artifacts.mkdir(parents=True)
        inputs, log = artifacts / "inputs.json", artifacts / "aiperf.log"
        _write_inputs(inputs, model, load)
        for name, content in _TOKENIZER.items():
            (artifacts / name).write_text(json.dumps(content))
        command = [str(self.program), *_arguments(url, model, load, inputs, artifacts)]
        command += ["--api-key", key] if key else []
        with tethered(command, log, _variables(artifacts)) as process:
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired as late:
                raise StageError(
                    f"AIPerf was not done with {load.point} after {timeout_s:g} s (point_timeout_s); {last_lines(log)}"
                ) from late
        if status:
            raise StageError(f"AIPerf failed with status {status} at {load.point}; {last_lines(log)}")
        inputs.unlink()
        return read_export(artifacts / EXPORT)


def find_client() -> Client:
    """Find AIPerf; its virtual environment is created if it does not exist.

    Raises:
        ConfigError: if ``MOESAIC_AIPERF`` names no program.
        StageError: if the virtual environment cannot be created, or AIPerf does not start.
    """
    program = AIPERF.find_program()
    return Client(program, program_version(program, "--version"))


def _write_inputs(path: Path, model: str, load: Load) -> None:
    """All request bodies, each a conversation of its own, one at a time: long prompts are many."""
    with path.open("w") as file:
        file.write('{"data": [')
        for number, body in enumerate(_bodies(model, load)):
            file.write(", " * bool(number) + json.dumps({"session_id": str(number), "payloads": [body]}))
        file.write("]}")


def _bodies(model: str, load: Load) -> Iterator[dict[str, Any]]:
    draws = random.Random(f"{load.seed} {load.point}")
    point = load.point
    for _ in range(load.warmup_requests + load.requests):
        yield {
            "model": model,
            "prompt": [draws.randrange(load.vocab_size) for _ in range(point.input_tokens)],
            "max_tokens": point.output_tokens,
            "min_tokens": point.output_tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _variables(artifacts: Path) -> dict[str, str]:
    """Environment variables of AIPerf: it goes by the site's proxies, and its files are kept for no other run."""
    return own_variables() | {
        "AIPERF_HTTP_TRUST_ENV": "true",
        "AIPERF_DATASET_MMAP_CACHE_ENABLED": "false",
        "AIPERF_DATASET_MMAP_BASE_PATH": str(artifacts.absolute()),
    }


def _arguments(url: str, model: str, load: Load, inputs: Path, artifacts: Path) -> list[str]:
    options = {
        "--model": model,
        "--tokenizer": artifacts.absolute(),
        "--url": url,
        "--endpoint-type": "completions",
        "--concurrency": load.point.concurrency,
        "--request-count": load.requests,
        "--input-file": inputs,
        "--custom-dataset-type": "inputs_json",
        "--dataset-sampling-strategy": "sequential",
        "--random-seed": load.seed,
        "--artifact-dir": artifacts,
        "--export-level": "summary",
        "--ui": "none",
    }
    if load.warmup_requests:
        options["--warmup-request-count"] = load.warmup_requests
    flags = ["--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics"]
    return ["profile", *(str(part) for pair in options.items() for part in pair), *flags]

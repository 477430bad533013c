"""One run of AIPerf against one server at one point of a sweep.

AIPerf gets whole request bodies (its ``inputs_json`` data set), so that nothing is left to it: the prompt is token ids,
exactly as many as the point says and never twice the same, and the reply ends after exactly as many as the point says.
Tokens are counted by the server (``--use-server-token-count``): a client that splits text into tokens again counts
others. AIPerf insists on a tokenizer all the same, and gets one of a single word. No cache of it outlives the run.

All it is told stands in a file: a command line is for every user of the machine to read, and a server's key is not. The
file only names the environment variable of the key, which AIPerf puts in (``${NAME}``).
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.child_processes import last_lines, tethered
from moesaic.core.errors import ConfigError, MoesaicError, StageError
from moesaic.core.network import CLIENT_CERTIFICATE
from moesaic.core.own_environment import own_variables, program_version
from moesaic.deploy.engines.server_answers import KEY_VARIABLE, NotYetError, fetch
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
_SETTINGS = "settings.yaml"


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
            key: what the server asks for.

        Raises:
            StageError: if it fails or takes longer, with the end of its output.
        """
        shutil.rmtree(artifacts, ignore_errors=True)
        artifacts.mkdir(parents=True)
        inputs, log = artifacts / "inputs.json", artifacts / "aiperf.log"
        _write_inputs(inputs, model, load)
        settings = {_SETTINGS: _settings(url, model, load, inputs, asks_key=key is not None)}
        for name, content in (_TOKENIZER | settings).items():
            (artifacts / name).write_text(json.dumps(content))
        command = [str(self.program), "profile", "--config", str(artifacts / _SETTINGS)]
        with tethered(command, log, _variables(artifacts, key)) as process:
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


def check_certificates(url: str) -> None:
    """Refuse a server that asks for a client's certificate, which AIPerf cannot show.

    Raises:
        ConfigError: that says so, or why the server refuses us as well. One that does not answer yet is left alone.
    """
    if not (url.startswith("https:") and os.environ.get(CLIENT_CERTIFICATE)):
        return
    page, expected = f"{url}/v1/models", "the list of models of an OpenAI-compatible server"
    key = os.environ.get(KEY_VARIABLE)
    with suppress(NotYetError):
        fetch(page, key, expected)
        try:
            fetch(page, key, expected, shows_certificate=False)
        except MoesaicError as refusal:
            raise ConfigError(
                f"{url} answers only clients that show a certificate ({CLIENT_CERTIFICATE}), and AIPerf shows none "
                f"({refusal}); name an address of this server that asks for none: plain HTTP within the site, or a "
                "proxy there that shows the certificate"
            ) from refusal


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


def _variables(artifacts: Path, key: str | None) -> dict[str, str]:
    """Environment variables of AIPerf: it goes by the site's proxies, and its files are kept for no other run."""
    variables = own_variables() | {
        "AIPERF_HTTP_TRUST_ENV": "true",
        "AIPERF_DATASET_MMAP_CACHE_ENABLED": "false",
        "AIPERF_DATASET_MMAP_BASE_PATH": str(artifacts.absolute()),
    }
    variables.pop(KEY_VARIABLE, None)
    return variables | ({KEY_VARIABLE: key} if key else {})


def _settings(url: str, model: str, load: Load, inputs: Path, *, asks_key: bool) -> dict[str, Any]:
    """AIPerf's config, version 2.0; JSON is YAML.

    The key is given as the header that it becomes: alone, one that is a number would be read as a number.
    """
    users = {"type": "concurrency", "concurrency": load.point.concurrency}
    key = {"headers": {"Authorization": f"Bearer ${{{KEY_VARIABLE}}}"}} if asks_key else {}
    before = users | {"requests": load.warmup_requests, "excludeFromResults": True}
    return {
        "schemaVersion": "2.0",
        "randomSeed": load.seed,
        "benchmark": {
            "model": model,
            "endpoint": {"url": url, "type": "completions", "streaming": True, "useServerTokenCount": True, **key},
            "tokenizer": {"name": str(inputs.parent.absolute())},
            "dataset": {
                "type": "file",
                "path": str(inputs.absolute()),
                "format": "inputs_json",
                "sampling": "sequential",
            },
            **({"warmup": before} if load.warmup_requests else {}),
            "profiling": users | {"requests": load.requests},
            "artifacts": {"dir": str(inputs.parent.absolute()), "records": False},
            "runtime": {"ui": "none"},
            "gpuTelemetry": {"enabled": False},
            "serverMetrics": {"enabled": False},
        },
    }

"""Starting and stopping a server process, and its state as HTTP shows it."""

import os
import socket
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.core.child_processes import last_lines, tethered
from moesaic.core.config import ServingEngine
from moesaic.core.errors import MoesaicError, StageError
from moesaic.deploy.engines.adapters import (
    COUNTERS,
    HOST,
    TOKEN_OPTIONS,
    ServerSpec,
    command,
    environment,
    model_name,
    running_url,
)
from moesaic.deploy.engines.server_answers import KEY_VARIABLE, NotYetError, fetch, fetch_json, unexpected

_POLL_S = 0.2
_MODELS, _METRICS = "the list of models of an OpenAI-compatible server", "counters in Prometheus' text format"


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    """Without the ``/v1``."""
    model: str
    """What it calls the model."""
    process: "subprocess.Popen[bytes] | None"
    """None if it is not ours."""
    log: Path
    owner: str = "vllm"
    """Who owns the model by its own word: what kind of server it is. Those that are not known are asked as vLLM is."""
    key: str | None = field(default=None, repr=False)
    """The key that it asks for."""

    @property
    def token_options(self) -> dict[str, Any]:
        """What a completion must ask for to get the token ids of the reply."""
        return dict(TOKEN_OPTIONS.get(self.owner, TOKEN_OPTIONS["vllm"]))

    def check_alive(self) -> None:
        """Raise StageError, with the end of its log, if it has died."""
        if self.process is not None and self.process.poll() is not None:
            raise StageError(
                f"the server of {self.model} died, status {self.process.returncode}; {last_lines(self.log)}"
            )

    def counts(self) -> dict[str, int]:
        """Its own counters since its start, by field of a load sweep's ``Counts``; only those it has."""
        for counters in COUNTERS:
            try:
                text = fetch(self.url + counters.path, self.key, _METRICS)
            except MoesaicError:
                continue  # no such page: another kind of server
            if values := read_counters(text, counters.names.values()):
                return {field: values.get(name, 0) for field, name in counters.names.items()}
        return {}


@contextmanager
def started_server(engine: ServingEngine, spec: ServerSpec, log: Path, timeout_s: float) -> Iterator[Server]:
    """Start a server and wait until it answers; stop it when the block ends.

    Args:
        engine: which kind.
        spec: what it serves.
        log: where its output goes.
        timeout_s: how long it may take to answer.

    Raises:
        ConfigError: if what answers at the address is no such server, or refuses the key.
        StageError: if it dies or does not answer in time, with the end of its log.
    """
    if engine == "running":
        url, key = running_url(spec.role), os.environ.get(KEY_VARIABLE)
        models = _await_models(url, key, None, log, timeout_s)
        name, owner = next(iter(models.items()))
        yield Server(url, name, None, log, owner, key)
        return
    port = _free_port()
    url = f"http://{HOST}:{port}"
    name = model_name(engine, spec)
    with tethered(command(engine, spec, port), log, environment(engine, spec)) as process:
        if name not in (models := _await_models(url, None, process, log, timeout_s)):
            raise StageError(f"{url} serves {[*models]}, not {name!r}: another server took the port; start again")
        yield Server(url, name, process, log, models[name])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _await_models(
    url: str, key: str | None, process: "subprocess.Popen[bytes] | None", log: Path, timeout_s: float
) -> dict[str, str]:
    """Who owns each model that is served, once the server answers; what refuses for good is not asked again."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return _models(url, key)
        except NotYetError as failure:
            why = str(failure)
        if process is not None and process.poll() is not None:
            raise StageError(f"the server ended with status {process.returncode} before it served; {last_lines(log)}")
        if time.monotonic() > end:
            seen = last_lines(log) if process is not None else f"is {url} right?"
            raise StageError(
                f"the server at {url} was not ready after {timeout_s:g} s (startup_timeout_s): {why}; {seen}"
            )
        time.sleep(_POLL_S)


def _models(url: str, key: str | None) -> dict[str, str]:
    page = f"{url}/v1/models"
    listed = fetch_json(page, key, _MODELS)
    try:
        models = {str(entry["id"]): str(entry.get("owned_by") or "") for entry in listed["data"]}
    except (AttributeError, KeyError, TypeError) as strange:
        raise unexpected(page, str(listed), _MODELS) from strange
    if not models:
        raise unexpected(page, "no model", _MODELS)
    return models


def read_counters(text: str, names: Collection[str]) -> dict[str, int]:
    """Of Prometheus' text format the counters of these names that are there, each summed over its labels."""
    values: dict[str, int] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            with suppress(IndexError, OverflowError, ValueError):  # a line without a number, or NaN
                value = int(float(line.rpartition("}")[2].removeprefix(name).split()[0]))
                values[name] = values.get(name, 0) + value
    return values

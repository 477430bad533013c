"""Starting and stopping a server process, and its state as HTTP shows it."""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.child_processes import last_lines, tethered
from moesaic.core.config import ServingEngine
from moesaic.core.errors import StageError
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

_POLL_S = 0.2
_ANSWER_WITHIN_S = 10.0


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
                values = read_counters(_get(self.url + counters.path), counters.names.values())
            except OSError:
                continue  # no such page: another kind of server
            if values:
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
        StageError: if it dies or does not answer in time, with the end of its log.
    """
    if engine == "running":
        url = running_url(spec.role)
        _await_health(url, None, log, timeout_s)
        name, owner = next(iter(_models(url).items()))
        yield Server(url, name, None, log, owner)
        return
    port = _free_port()
    url = f"http://{HOST}:{port}"
    name = model_name(engine, spec)
    with tethered(command(engine, spec, port), log, environment(engine, spec)) as process:
        _await_health(url, process, log, timeout_s)
        if name not in (models := _models(url)):
            raise StageError(f"{url} serves {[*models]}, not {name!r}: another server took the port; start again")
        yield Server(url, name, process, log, models[name])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _await_health(url: str, process: "subprocess.Popen[bytes] | None", log: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not _is_healthy(url):
        if process is not None and process.poll() is not None:
            raise StageError(f"the server ended with status {process.returncode} before it served; {last_lines(log)}")
        if time.monotonic() > end:
            seen = last_lines(log) if process is not None else f"is {url} right?"
            raise StageError(f"the server at {url} was not ready after {timeout_s:g} s (startup_timeout_s); {seen}")
        time.sleep(_POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        _get(f"{url}/health")
    except OSError:
        return False
    return True


def _models(url: str) -> dict[str, str]:
    """Who owns each model that is served."""
    return {entry["id"]: entry.get("owned_by", "") for entry in json.loads(_get(f"{url}/v1/models"))["data"]}


def _get(url: str) -> str:
    """The body of a reply of status 200; the server is near, so no proxy is asked."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=_ANSWER_WITHIN_S) as answer:
        return str(answer.read().decode())


def read_counters(text: str, names: Collection[str]) -> dict[str, int]:
    """Of Prometheus' text format the counters of these names that are there, each summed over its labels."""
    values: dict[str, int] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            value = line.rpartition("}")[2].removeprefix(name).split()[0]
            values[name] = values.get(name, 0) + int(float(value))
    return values

"""What differs between servers: the command that starts one, and where and how it counts."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moesaic.core.config import EmulatedCache, Precision, ServingEngine
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.redaction import redact
from moesaic.deploy.engines.vllm import engine as vllm
from moesaic.deploy.engines.vllm.environment import vllm_environment

URL_VARIABLE = "MOESAIC_SERVER_URL_{role}"
"""Environment variable of a running server of the ``PARENT`` or the ``CHILD``, or where there is one, the ``MODEL``."""
HOST = "127.0.0.1"


@dataclass(frozen=True)
class ServerSpec:
    """What one server is to serve."""

    role: str
    """``parent``, ``child`` or, alone, ``model``; also the name clients call the model by."""
    directory: Path
    """A checkpoint, or for TensorRT-LLM and vLLM an export bundle."""
    kv_cache: EmulatedCache
    precision: Precision
    max_requests: int
    """In flight at once."""
    max_cache_tokens: int
    """Of the requests in flight together, at their full length."""


@dataclass(frozen=True)
class Counters:
    """Where a server's own counters are, and what it calls them."""

    path: str
    names: Mapping[str, str]
    """Name by field of a load sweep's ``Counts``; what a server does not count is left out."""


COUNTERS = (
    Counters(
        "/metrics",
        {
            "requests": "moesaic_replies_finished_total",
            "input_tokens": "moesaic_prompt_tokens_total",
            "output_tokens": "moesaic_generated_tokens_total",
        },
    ),
    Counters("/metrics", {"requests": "vllm:request_success_total", "output_tokens": "vllm:generation_tokens_total"}),
    Counters(
        "/prometheus/metrics",
        {"requests": "trtllm_request_success_total", "output_tokens": "trtllm_generation_tokens_total"},
    ),
)
"""Of all servers that are known; a running one need not say which it is."""

TOKEN_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "moesaic": {"return_token_ids": True},
    "vllm": {"return_token_ids": True, "include_stop_str_in_output": True},
    "tensorrt_llm": {"detokenize": False, "include_stop_str_in_output": True},
}
"""What puts all token ids of the reply into a completion, as ``token_ids`` of its choice; by who owns the model in
``/v1/models``."""

_BUNDLED = {"tensorrt_llm": "serve.yaml", "vllm": "serve.args"}


def check_available(engine: ServingEngine, spec: ServerSpec) -> None:
    """Refuse what could not be started.

    Raises:
        ConfigError: if the program is not installed, or no running server is named.
        StageError: if vLLM's environment cannot be made.
        ArtifactError: if the directory is no bundle of this engine.
    """
    if engine == "running":
        running_url(spec.role)
    elif engine in _BUNDLED:
        if engine == "tensorrt_llm" and shutil.which("trtllm-serve") is None:
            raise ConfigError(f"engine {engine!r} needs trtllm-serve, which is not on the PATH; use its image")
        if not (spec.directory / _BUNDLED[engine]).is_file():
            raise ArtifactError(
                f"{spec.directory} holds no {_BUNDLED[engine]}; for engine {engine!r} give a bundle of export_engine"
            )
        if engine == "vllm":
            vllm_environment().find_program()


def running_url(role: str) -> str:
    """The address of a server that runs already.

    Raises:
        ConfigError: if none is named, or it is no address.
    """
    variable = URL_VARIABLE.format(role=role.upper())
    if not (url := os.environ.get(variable)):
        raise ConfigError(f"engine 'running' needs the server's address; set {variable}, such as http://host:8000")
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        named = False
    if not named or "@" in url or "?" in url or "#" in url:
        raise ConfigError(
            f"{variable} is {redact(url, {})!r}; it must be an address like http://host:8000, with nothing but a path "
            "behind it and no name or password in it (a server's key goes into OPENAI_API_KEY)"
        )
    return url.rstrip("/").removesuffix("/v1")


def model_name(engine: ServingEngine, spec: ServerSpec) -> str:
    """What a server that was started here calls the model; TensorRT-LLM has its own mind about it."""
    return spec.directory.name if engine == "tensorrt_llm" else spec.role


def environment(engine: ServingEngine, spec: ServerSpec) -> dict[str, str]:
    """The server's environment: the engines' worker processes import the bundle's model module by themselves."""
    if engine == "vllm":
        return vllm.variables(spec.directory)
    paths = [str(spec.directory), os.environ.get("PYTHONPATH", "")] if engine == "tensorrt_llm" else []
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(filter(None, paths))} if paths else {})}


def command(engine: ServingEngine, spec: ServerSpec, port: int) -> list[str]:
    """What starts the server."""
    address = ["--host", HOST, "--port", str(port)]
    bundle = str(spec.directory)
    if engine == "tensorrt_llm":
        options = ["--backend", "pytorch", "--config", str(spec.directory / "serve.yaml")]
        return ["trtllm-serve", bundle, *address, *options, "--custom_module_dirs", str(spec.directory / "trtllm")]
    if engine == "vllm":
        server = vllm.server_command(spec.directory, spec.max_cache_tokens)
        return [*server, *address, "--served-model-name", spec.role]
    options = ["--kv-cache-dtype", spec.kv_cache, "--precision", spec.precision]
    options += ["--max-batch", str(spec.max_requests), "--max-cache-tokens", str(spec.max_cache_tokens)]
    return [
        sys.executable,
        "-m",
        "moesaic.command_line.main",
        "serve",
        bundle,
        *address,
        "--name",
        spec.role,
        *options,
    ]

"""The process: bind the port, load the model, serve until it is told to stop."""

import asyncio
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from moesaic.core.errors import ConfigError
from moesaic.data.chat import find_markers, load_tokenizer, render_conversation
from moesaic.deploy.server.app import create_app
from moesaic.deploy.server.batching import Batcher
from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.served_model import ServedModel
from moesaic.deploy.server.thinking import ThinkTags
from moesaic.models import kv_cache
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import stop_ids
from moesaic.models.loading import choose_device
from moesaic.models.whole_model import load_model

_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none sends a request into one that is being closed."""
_FLUSH_S = 5
"""For responses that are still being sent when their tokens are done."""
_SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep Python to itself: with the usual 5 ms, small models' tokens would leave in bunches."""


def load(directory: Path, name: str, kv_dtype: str, precision: str | None, limits: ServerLimits) -> ServedModel:
    """Load a checkpoint to serve it.

    Args:
        directory: the checkpoint.
        name: what clients call it.
        kv_dtype: ``bf16``, ``fp8_unit`` or ``fp8``: what the KV cache rounds to.
        precision: what the model computes in; None: bfloat16 on an accelerator, float32 on a CPU.
        limits: its context is cut to the model's.

    Raises:
        ArtifactError: if the checkpoint is missing, damaged, of another family, has no tokenizer, or a chat template
            that refuses a question.
        ConfigError: if ``fp8`` is asked for and the checkpoint has no scales.
    """
    checkpoint = Checkpoint.open(directory)
    scales = kv_cache.scales_for(kv_dtype, checkpoint)
    tokenizer = load_tokenizer(directory)
    render_conversation([{"role": "user", "content": "Hello"}], tokenizer, "medium")
    device = choose_device()
    dtype = getattr(torch, precision or ("float32" if device.type == "cpu" else "bfloat16"))
    model = load_model(directory, dtype).to(device)
    kv_cache.emulate(model, kv_cache.roundings(kv_dtype, scales))
    positions = int(model.config.max_position_embeddings)
    limits = replace(limits, max_context=min(limits.max_context, positions))
    markers, tags = find_markers(tokenizer), ThinkTags.of(tokenizer)
    return ServedModel(name, int(time.time()), model, tokenizer, markers, tags, stop_ids(model), limits)


def bind(host: str, port: int) -> socket.socket:
    """Take the port, before the model is loaded; connections are refused until it is.

    Raises:
        ConfigError: if it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as on_failure:
            listener = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_failure.pop_all()
    except (OSError, OverflowError, UnicodeError) as failure:
        raise ConfigError(f"cannot serve at {host} port {port}: {failure}; choose --host and --port") from failure
    return listener


def serve(served: ServedModel, listener: socket.socket, stop_within_s: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        served: the model.
        listener: a bound socket.
        stop_within_s: how long replies that were taken on may go on after the signal.
        ready: called once requests are answered.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    batcher = Batcher(served.model, served.limits)
    StoppingServer(create_app(served, batcher), batcher, stop_within_s, ready).run([listener])


class StoppingServer(uvicorn.Server):
    """Told to stop, it answers new requests with 503 and finishes those it has, for a while; told twice, it ends."""

    def __init__(self, app: FastAPI, batcher: Batcher, stop_within_s: float, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            backlog=2048,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
        )
        super().__init__(config)
        self._batcher, self._stop_within_s, self._ready = batcher, stop_within_s, ready
        self._stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then call ``ready``."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; the process then ends as after any other work, with exit code 0."""
        if self._stop_at is not None:
            self.should_exit = self.force_exit = True
            return
        self._batcher.close()
        self._stop_at = time.monotonic() + self._stop_within_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end when nothing runs any more, or when the time is up."""
        if self._stop_at is not None:
            is_over = self._batcher.is_idle or time.monotonic() > self._stop_at
            self.should_exit = self.should_exit or is_over
        if self.should_exit:
            await asyncio.to_thread(self._batcher.abort)
        return await super().on_tick(counter)

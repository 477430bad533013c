"""Replies from a server: for ``evaluate`` and ``generate_traces``, when they do not load the model themselves."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from moesaic.core.config import Amount, EmulatedCache, GeneratingEngine, Positive, Precision
from moesaic.core.errors import ConfigError
from moesaic.deploy.engines import ServerSpec, check_available, started_server
from moesaic.deploy.engines.completions import Arrival, Completion, RequestSettings, check_client, complete
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.bundle_manifest import MANIFEST, BundleManifest
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import read_stop_ids

Part = TypeVar("Part")

ROLE = "model"
"""What a running server's environment variable ends with, and what clients call the model."""


class AsksServer(Protocol):
    """What the configs of stages that may ask a server have in common; their docstrings say what each value means."""

    engine: GeneratingEngine
    bundle: ExportEngineConfig | None
    batch_size: Positive
    max_new_tokens: Positive
    precision: Precision
    startup_timeout_s: Amount
    reply_timeout_s: Amount


@contextmanager
def served_replies(
    config: AsksServer,
    model: Path,
    kv_cache: EmulatedCache | None,
    wanted: Sequence[Completion],
    scratch: Path,
) -> Iterator[Iterator[Arrival]]:
    """The replies of a server as they come in, ``batch_size`` requests at once; the server runs while the block does.

    Args:
        config: its engine is a server.
        model: a checkpoint, or an export bundle.
        kv_cache: what the server's cache must be, and what ``moesaic serve`` emulates. None for any.
        wanted: at least one request.
        scratch: for the bundle, where one is made, and for the server's log.

    Raises:
        ConfigError: if the server's program or the client is not installed, no running server is named, or the bundle's
            cache differs; before the server is started.
        ArtifactError: if the model is no bundle of this engine.
        StageError: if the server does not start, dies, or replies without token ids.
    """
    assert config.engine != "in_process"
    model = _bundle(config, model, scratch)
    longest = max(len(one.prompt) for one in wanted) + config.max_new_tokens
    spec = ServerSpec(
        role=ROLE,
        directory=model.absolute(),
        kv_cache=kv_cache or "bf16",
        precision=config.precision,
        max_requests=config.batch_size,
        max_cache_tokens=config.batch_size * longest,
    )
    check_client()
    check_available(config.engine, spec)
    if config.engine in ("tensorrt_llm", "vllm") and kv_cache is not None:
        _check_cache(model, kv_cache)
    settings = RequestSettings(read_stop_ids(model), config.batch_size, config.reply_timeout_s)
    with (
        started_server(config.engine, spec, scratch / "server.log", config.startup_timeout_s) as server,
        closing(complete(server, wanted, settings)) as replies,
    ):
        yield replies


def whole_chunks(parts: Iterable[tuple[int, Part]], sizes: Sequence[int]) -> Iterator[tuple[int, list[Part]]]:
    """Each chunk's number and its parts, in their order, once the last of them is there.

    Args:
        parts: in any order; each with its place among the parts of all chunks.
        sizes: the number of parts of each chunk.
    """
    chunk_of = [number for number, size in enumerate(sizes) for _ in range(size)]
    begun: dict[int, dict[int, Part]] = {}
    for place, part in parts:
        number = chunk_of[place]
        chunk = begun.setdefault(number, {})
        chunk[place] = part
        if len(chunk) == sizes[number]:
            yield number, [part for _, part in sorted(begun.pop(number).items(), key=lambda item: item[0])]


def _bundle(config: AsksServer, model: Path, scratch: Path) -> Path:
    """What the engine reads: the model, or the bundle, mostly links, that the config makes of a checkpoint."""
    if config.bundle is None or (model / MANIFEST).is_file():
        return model
    bundle = scratch / "bundle"
    if not (bundle / MANIFEST).is_file():
        shutil.rmtree(bundle, ignore_errors=True)
        write_bundle(Checkpoint.open(model), bundle, config.bundle)
    return bundle


def _check_cache(bundle: Path, kv_cache: EmulatedCache) -> None:
    made_for = BundleManifest.read(bundle).kv_cache.kind
    if made_for != kv_cache:
        raise ConfigError(
            f"kv_cache is {kv_cache!r}, but the bundle {bundle} was exported with {made_for!r}; export one for it, "
            f"or say what it is"
        )

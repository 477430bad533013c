"""A model that a server speaks for: what ``evaluate`` and ``generate_traces`` share when they do not load it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesaic.checkpoint import Checkpoint
from moesaic.configs import EmulatedCache, EvaluateConfig, GenerateTracesConfig
from moesaic.engines.servers import Offer, Server, check_available, serving
from moesaic.errors import ConfigError
from moesaic.export.bundle import write_bundle
from moesaic.export.manifest import MANIFEST, ExportManifest

ROLE = "model"
"""What a running server's environment variable ends with, and what clients call the model."""


def bundled(config: EvaluateConfig | GenerateTracesConfig, model: Path, scratch: Path) -> Path:
    """What the engine reads: the model, or the bundle, mostly links, that the config makes of a checkpoint."""
    if config.bundle is None or (model / MANIFEST).is_file():
        return model
    bundle = scratch / "bundle"
    if not (bundle / MANIFEST).is_file():
        shutil.rmtree(bundle, ignore_errors=True)
        write_bundle(Checkpoint.open(model), bundle, config.bundle)
    return bundle


def check_served(config: EvaluateConfig | GenerateTracesConfig, model: Path, kv_cache: EmulatedCache | None) -> None:
    """Refuse a server that could not be started, or whose KV cache is not the one that is asked for.

    Args:
        config: its engine is a server.
        model: a checkpoint, or an export bundle.
        kv_cache: None for any.

    Raises:
        ConfigError: if the server's program is not installed, no running one is named, or the bundle's cache differs.
        ArtifactError: if the model is no bundle of this engine.
    """
    assert config.engine != "in_process"
    check_available(config.engine, _offer(config, model, kv_cache, 1))
    if config.engine in ("tensorrt_llm", "vllm") and kv_cache is not None:
        made_for = ExportManifest.read(model).kv_cache.kind
        if made_for != kv_cache:
            raise ConfigError(
                f"kv_cache is {kv_cache!r}, but the bundle {model} was exported with {made_for!r}; export one for it, "
                f"or say what it is"
            )


@contextmanager
def served(
    config: EvaluateConfig | GenerateTracesConfig, model: Path, kv_cache: EmulatedCache | None, longest: int, log: Path
) -> Iterator[Server]:
    """The server for as long as the block lasts.

    Args:
        config: its engine is a server.
        model: a checkpoint, or an export bundle.
        kv_cache: what ``moesaic serve`` emulates.
        longest: tokens of the longest request, its reply included.
        log: where the server's output goes.
    """
    assert config.engine != "in_process"
    offer = _offer(config, model, kv_cache, longest)
    with serving(config.engine, offer, log, config.startup_timeout_s) as server:
        yield server


def _offer(
    config: EvaluateConfig | GenerateTracesConfig, model: Path, kv_cache: EmulatedCache | None, longest: int
) -> Offer:
    return Offer(
        role=ROLE,
        directory=model.absolute(),
        kv_cache=kv_cache or "bf16",
        precision=config.precision,
        max_requests=config.batch_size,
        max_cache_tokens=config.batch_size * longest,
    )

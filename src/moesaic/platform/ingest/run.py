"""Bring the inputs of a pipeline run in: look each one up in the store, check it whole, hand on its manifest."""

from pathlib import Path

from moesaic.core.errors import ArtifactError
from moesaic.data.chat import load_tokenizer
from moesaic.data.sets import count_rows
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import read_stop_ids
from moesaic.models.loading import check_weights
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.store import Address, Kind, Manifest, Store
from moesaic.platform.store.manifest import MANIFEST


def run(config: IngestConfig, *, store: Address, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``<input>/manifest.json`` for each input the config names, after recomputing every digest."""
    contents = Store.at(store)
    metrics: dict[str, float] = {}
    for name in type(config).model_fields:
        kind: Kind = "model" if name == "parent" else "dataset"
        manifest = contents.manifest(getattr(config, name))
        if manifest.kind != kind:
            raise ArtifactError(f"{name} = {manifest.id} is a {manifest.kind}, not a {kind}; give the id of a {kind}")
        tree = contents.materialize(manifest, verify=True)
        metrics |= check_model(tree) if kind == "model" else {f"{name}_rows": float(count_rows(name, tree))}
        _write(manifest, output / name)
    return metrics


def check_model(directory: Path) -> dict[str, float]:
    """Look at a parent whole: layout, config, tokenizer, what ends a reply, and that its numbers are finite.

    Raises:
        MoesaicError: that says what is wrong.
    """
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_prunable()
    load_tokenizer(directory)
    read_stop_ids(directory)
    check_weights(checkpoint)
    return {
        "parent_layers": checkpoint.num_layers,
        "parent_experts": checkpoint.architecture.num_experts,
        "parent_unused_tensors": len(checkpoint.unused),
    }


def _write(manifest: Manifest, directory: Path) -> None:
    directory.mkdir()
    (directory / MANIFEST).write_text(manifest.to_json())

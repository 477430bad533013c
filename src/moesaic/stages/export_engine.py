"""Export a child as a deployment bundle for one serving engine, and check it as far as that goes without the engine."""

import json
from pathlib import Path

from moesaic.checkpoint import Checkpoint
from moesaic.configs import ExportEngineConfig
from moesaic.errors import ArtifactError, StageError
from moesaic.export.bundle import write_bundle
from moesaic.export.manifest import VALIDATION
from moesaic.export.validation import validate
from moesaic.progress import track


def run(config: ExportEngineConfig, *, child: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write the bundle into ``output``; with ``validation.json``, which lists what was checked, it is done."""
    manifest = write_bundle(Checkpoint.open(child), output, config)
    compared = child if config.compare_outputs else None
    try:
        checks = list(track(validate(output, compared), 6 if compared is None else 7, "checking the bundle"))
    except ArtifactError as wrong:
        raise StageError(f"the bundle that was written is not valid: {wrong}") from wrong
    (output / VALIDATION).write_text(json.dumps({"valid": True, "checks": checks}, indent=1) + "\n")
    folded = [scale for layer in manifest.layers for scale in (layer.key_scale, layer.value_scale) if scale]
    return {
        "files": float(len(manifest.files)),
        "size_mib": sum(entry.size_bytes for entry in manifest.files) / 2**20,
        "checks": float(len(checks)),
        "largest_scale": max(folded, default=1.0),
    }

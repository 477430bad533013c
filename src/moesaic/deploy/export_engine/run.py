"""Export a child as a deployment bundle for one serving engine, and check its files and layout. No engine loads it."""

import json
from pathlib import Path

from moesaic.core.errors import ArtifactError, StageError
from moesaic.core.progress import track
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.bundle_manifest import VALIDATION
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.export_engine.validation import validate
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.models.checkpoint import Checkpoint


def run(config: ExportEngineConfig, *, child: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write the bundle into ``output``; with ``validation.json``, which lists what was checked, it is done."""
    manifest = write_bundle(Checkpoint.open(child), output, config)
    compared = child if config.compare_outputs else None
    try:
        checks = list(track(validate(output, compared), 5 if compared is None else 6, "checking the bundle"))
    except ArtifactError as wrong:
        raise StageError(f"the bundle that was written failed a check: {wrong}") from wrong
    verdict = {"verdict": Verdict(passed=True).words, "passed": True, "checks": checks}
    (output / VALIDATION).write_text(json.dumps(verdict, indent=1) + "\n")
    folded = [scale for layer in manifest.layers for scale in (layer.key_scale, layer.value_scale) if scale]
    return {
        "files": float(len(manifest.files)),
        "size_mib": sum(entry.size_bytes for entry in manifest.files) / 2**20,
        "checks": float(len(checks)),
        "largest_scale": max(folded, default=1.0),
    }

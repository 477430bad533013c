"""Brings the inputs of a pipeline run in: looks each one up in the store by its manifest's id, recomputes every digest,
opens the checkpoint by its headers and reads every row of the data sets.
"""

from moesaic.core.config import Config
from moesaic.core.stage import Stage, dataset, model


class IngestConfig(Config):
    """Which inputs a pipeline run starts from, by the digests of their manifests in the store."""

    parent: str
    """The model to compress."""
    calibration_short: str
    """Conversations that rank experts and score blocks."""
    calibration_long: str
    """Conversations whose answers depend on far context."""
    prompts: str
    """Problems the parent answers for distillation, and the policies are trained on."""
    tests: str
    """Problems to evaluate on."""


STAGE = Stage(
    name="ingest",
    config=IngestConfig,
    runtime="search",
    inputs=(),
    outputs=(
        model("parent", "manifest of the checkpoint to compress"),
        dataset("calibration_short", "manifest of the conversations that rank experts and score blocks"),
        dataset("calibration_long", "manifest of the conversations whose answers depend on far context"),
        dataset("prompts", "manifest of the problems to learn from"),
        dataset("tests", "manifest of the problems to evaluate on"),
    ),
    reads_store=True,
)

"""Registers a child in MLflow's model registry, holds it against the gate, and makes it the champion if every line is
met.

A child that fails the gate stays the challenger; the task succeeds, since that is a result. Run again, the task changes
nothing more. `MLFLOW_TRACKING_URI` names the registry, see `docs/registry.md`.
"""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Amount, Config, Effort
from moesaic.core.stage import Stage, artifact, model


class PromoteConfig(Config):
    """What a child must show to become the champion of the model registry, see ``moesaic.platform.promote.gate``."""

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "moesaic"
    """Name of the registered model whose versions are children of one parent."""
    margin_points: dict[Effort, Amount] = {"low": 3.0, "medium": 3.0, "high": 3.0}
    """Points of accuracy, by effort: the 95 % interval of child minus parent must lie above minus this. The fewer the
    problems, the wider the interval, and the wider a margin that an equal child clears; see ``docs/registry.md``."""
    min_request_efficiency: dict[Effort, Amount] = {"low": 1.0, "medium": 1.0, "high": 1.0}
    """Least request rate over the parent's at equal effort."""
    kv_margin_points: dict[Effort, Amount] = {"low": 3.0, "medium": 3.0, "high": 3.0}
    """The same for the child's calibrated FP8 KV cache against its BF16 cache."""
    outside_margin_points: dict[str, Amount] = {}
    """The same for accuracies of harnesses outside this project, by task: ``moesaic promote --outside`` gives them."""
    require_export: bool = True
    """Whether there must be an exported bundle that no check found wrong."""
    require_engine: bool = False
    """Whether an engine must have loaded it and agreed; where none can be had, a bundle is unverified."""
    pipeline: str = ""
    """Name and version of the pipeline that made the child, for the version's tags."""
    recipe: str = ""
    """Name of the recipe it was made with, for the version's tags."""


STAGE = Stage(
    name="promote",
    config=PromoteConfig,
    runtime="search",
    inputs=(
        model("child", "manifest of the child; its weights stay in the store", by_manifest=True),
        artifact("report", "the report of this child: `summary.json`"),
        artifact("bundle", "the exported bundle: `validation.json`", optional=True, by_manifest=True),
        artifact("verdict", "an engine's word on that bundle: `verdict.json`", optional=True),
    ),
    outputs=(artifact("promotion", "`promotion.json`: version, outcome, and the gate's lines"),),
    reads_store=True,
    reads_registry=True,
)

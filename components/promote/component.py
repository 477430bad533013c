"""Kubeflow component of the stage `promote`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def promote(
    config: str,
    version: str,
    child: Input[Model],
    report: Input[Artifact],
    promotion: Output[Artifact],
    metrics: Output[Metrics],
    bundle: Input[Artifact] | None = None,
    verdict: Input[Artifact] | None = None,
):
    """Registers a child in MLflow's model registry, holds it against the gate, and makes it the champion if
    every line is met.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "promote",
        config,
        inputs={
            "child": child,
            "report": report,
            "bundle": bundle,
            "verdict": verdict,
        },
        outputs={
            "promotion": promotion,
            "metrics": metrics,
        },
    )

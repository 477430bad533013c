"""Kubeflow component of the stage `promote`."""

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
):
    """Register the child, and make it the champion if it passes the gate."""
    from moesaic.runtime import run_stage

    run_stage(
        "promote",
        config,
        inputs={"child": child, "report": report, "bundle": bundle},
        outputs={"promotion": promotion, "metrics": metrics},
    )

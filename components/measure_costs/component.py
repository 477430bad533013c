"""Kubeflow component of the stage `measure_costs`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def measure_costs(
    config: str,
    version: str,
    parent: Input[Model],
    costs: Output[Artifact],
    metrics: Output[Metrics],
):
    """Find the memory and the runtime of every variant under every workload."""
    from moesaic.runtime import run_stage

    run_stage(
        "measure_costs",
        config,
        inputs={"parent": parent},
        outputs={"costs": costs, "metrics": metrics},
    )

"""Kubeflow component of the stage `measure_costs`, written by `make compile`."""

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
    """Finds memory and runtime of every variant under every workload, measured on this device, in process or in
    the serving engine, or computed from a hardware table.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "measure_costs",
        config,
        inputs={
            "parent": parent,
        },
        outputs={
            "costs": costs,
            "metrics": metrics,
        },
    )

"""Kubeflow component of the stage `export_engine`."""

from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def export_engine(
    config: str,
    version: str,
    child: Input[Model],
    bundle: Output[Model],
    metrics: Output[Metrics],
):
    """Write and validate the bundle that a serving engine loads."""
    from moesaic.runtime import run_stage

    run_stage("export_engine", config, inputs={"child": child}, outputs={"bundle": bundle, "metrics": metrics})

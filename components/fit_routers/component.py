"""Kubeflow component of the stage `fit_routers`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def fit_routers(
    config: str,
    version: str,
    child: Input[Model],
    parent: Input[Model],
    calibration: Input[Dataset],
    fitted: Output[Model],
    metrics: Output[Metrics],
):
    """Optional fit of a pruned child's routers to the experts that are left, without training."""
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "fit_routers",
        config,
        inputs={
            "child": child,
            "parent": parent,
            "calibration": calibration,
        },
        outputs={
            "fitted": fitted,
            "metrics": metrics,
        },
    )

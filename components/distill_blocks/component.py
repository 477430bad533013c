"""Kubeflow component of the stage `distill_blocks`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def distill_blocks(
    config: str,
    version: str,
    child: Input[Model],
    parent: Input[Model],
    calibration: Input[Dataset],
    trained: Output[Model],
    metrics: Output[Metrics],
):
    """Optional block-wise local distillation on nemo_toolkit."""
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "distill_blocks",
        config,
        inputs={
            "child": child,
            "parent": parent,
            "calibration": calibration,
        },
        outputs={
            "trained": trained,
            "metrics": metrics,
        },
    )

"""Kubeflow component of the stage `calibrate_kv`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.KV, install_kfp_package=False)
def calibrate_kv(
    config: str,
    version: str,
    model: Input[Model],
    calibration: Input[Dataset],
    calibrated: Output[Model],
    metrics: Output[Metrics],
):
    """Find the FP8 scales of the KV cache."""
    from moesaic.runtime import run_stage

    run_stage(
        "calibrate_kv",
        config,
        inputs={"model": model, "calibration": calibration},
        outputs={"calibrated": calibrated, "metrics": metrics},
    )

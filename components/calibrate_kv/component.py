"""Kubeflow component of the stage `calibrate_kv`, written by `make compile`."""

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
    """Max-calibrated scales of K (after RoPE) and V per layer by NVIDIA ModelOpt, as one small shard beside
    untouched weights.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "calibrate_kv",
        config,
        inputs={
            "model": model,
            "calibration": calibration,
        },
        outputs={
            "calibrated": calibrated,
            "metrics": metrics,
        },
    )

"""Kubeflow component of the stage `benchmark`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def benchmark(
    config: str,
    version: str,
    parent: Input[Model],
    child: Input[Model],
    measurements: Output[Artifact],
    metrics: Output[Metrics],
):
    """Times prefill and decode of parent and child at several batch sizes and context lengths, interleaved on
    this device.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "benchmark",
        config,
        inputs={
            "parent": parent,
            "child": child,
        },
        outputs={
            "measurements": measurements,
            "metrics": metrics,
        },
    )

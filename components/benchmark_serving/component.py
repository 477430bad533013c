"""Kubeflow component of the stage `benchmark_serving`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SERVE, install_kfp_package=False)
def benchmark_serving(
    config: str,
    version: str,
    parent: Input[Model],
    child: Input[Model],
    serving: Output[Artifact],
    metrics: Output[Metrics],
):
    """Serves parent and child in turns and sweeps over numbers of users with AIPerf: throughput, time to first
    token, time between tokens, request latency.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "benchmark_serving",
        config,
        inputs={
            "parent": parent,
            "child": child,
        },
        outputs={
            "serving": serving,
            "metrics": metrics,
        },
    )

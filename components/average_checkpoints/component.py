"""Kubeflow component of the stage `average_checkpoints`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def average_checkpoints(
    config: str,
    version: str,
    policies: Input[list[Model]],
    averaged: Output[Model],
    metrics: Output[Metrics],
):
    """The weighted mean of policies that come from one checkpoint; experts must be the same bytes in all."""
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "average_checkpoints",
        config,
        inputs={
            "policies": policies,
        },
        outputs={
            "averaged": averaged,
            "metrics": metrics,
        },
    )

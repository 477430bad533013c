"""Kubeflow component of the stage `average_checkpoints`."""

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
    """Average the weights of any number of policies."""
    from moesaic.runtime import run_stage

    run_stage(
        "average_checkpoints", config, inputs={"policies": policies}, outputs={"averaged": averaged, "metrics": metrics}
    )

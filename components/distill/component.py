"""Kubeflow component of the stage `distill`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def distill(
    config: str,
    version: str,
    child: Input[Model],
    parent: Input[Model],
    traces: Input[Dataset],
    trained: Output[Model],
    metrics: Output[Metrics],
):
    """Recover the child from its parent by distillation, experts and router frozen."""
    from moesaic.runtime import run_stage

    run_stage(
        "distill",
        config,
        inputs={"child": child, "parent": parent, "traces": traces},
        outputs={"trained": trained, "metrics": metrics},
    )

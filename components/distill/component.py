"""Kubeflow component of the stage `distill`, written by `make compile`."""

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
    """Global knowledge distillation on NeMo AutoModel: KL on logits and cosine of hidden states, experts and
    router frozen.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "distill",
        config,
        inputs={
            "child": child,
            "parent": parent,
            "traces": traces,
        },
        outputs={
            "trained": trained,
            "metrics": metrics,
        },
    )

"""Kubeflow component of the stage `generate_traces`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def generate_traces(
    config: str,
    version: str,
    model: Input[Model],
    prompts: Input[Dataset],
    traces: Output[Dataset],
    metrics: Output[Metrics],
):
    """Let the parent answer the prompts at every effort."""
    from moesaic.runtime import run_stage

    run_stage(
        "generate_traces",
        config,
        inputs={"model": model, "prompts": prompts},
        outputs={"traces": traces, "metrics": metrics},
    )

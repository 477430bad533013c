"""Kubeflow component of the stage `generate_traces`, written by `make compile`."""

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
    """The parent answers every prompt at each effort; its answers, as token ids, are what distillation learns
    from.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "generate_traces",
        config,
        inputs={
            "model": model,
            "prompts": prompts,
        },
        outputs={
            "traces": traces,
            "metrics": metrics,
        },
    )

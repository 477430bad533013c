"""Kubeflow component of the stage `evaluate`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def evaluate(
    config: str,
    version: str,
    model: Input[Model],
    tests: Input[Dataset],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
):
    """Measures accuracy and generated tokens per task and reasoning effort."""
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "evaluate",
        config,
        inputs={
            "model": model,
            "tests": tests,
        },
        outputs={
            "evaluation": evaluation,
            "metrics": metrics,
        },
    )

"""Kubeflow component of the stage `evaluate`."""

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
    """Measure accuracy and generated tokens on verifiable problems, per effort."""
    from moesaic.runtime import run_stage

    run_stage(
        "evaluate",
        config,
        inputs={"model": model, "tests": tests},
        outputs={"evaluation": evaluation, "metrics": metrics},
    )

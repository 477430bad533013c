"""Kubeflow component of the stage `validate_bundle`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SERVE, install_kfp_package=False)
def validate_bundle(
    config: str,
    version: str,
    bundle: Input[Model],
    prompts: Input[Dataset],
    verdict: Output[Artifact],
    metrics: Output[Metrics],
):
    """Loads a bundle in the engine that it is for, reads from it what each layer is, and holds its greedy
    replies against transformers.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "validate_bundle",
        config,
        inputs={
            "bundle": bundle,
            "prompts": prompts,
        },
        outputs={
            "verdict": verdict,
            "metrics": metrics,
        },
    )

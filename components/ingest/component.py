"""Kubeflow component of the stage `ingest`."""

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def ingest(
    config: str,
    version: str,
    parent: Output[Model],
    calibration_short: Output[Dataset],
    calibration_long: Output[Dataset],
    prompts: Output[Dataset],
    tests: Output[Dataset],
    metrics: Output[Metrics],
):
    """Look the inputs up in the store, check them whole, hand on their manifests."""
    from moesaic.runtime import run_stage

    run_stage(
        "ingest",
        config,
        inputs={},
        outputs={
            "parent": parent,
            "calibration_short": calibration_short,
            "calibration_long": calibration_long,
            "prompts": prompts,
            "tests": tests,
            "metrics": metrics,
        },
    )

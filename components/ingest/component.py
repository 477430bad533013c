"""Kubeflow component of the stage `ingest`, written by `make compile`."""

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
    """Brings the inputs of a pipeline run in: looks each one up in the store by its manifest's id, recomputes
    every digest, opens the checkpoint by its headers and reads every row of the data sets.
    """
    from moesaic.platform.runs.runtime import run_stage

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

"""Kubeflow component of the stage `rank_experts`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def rank_experts(
    config: str,
    version: str,
    parent: Input[Model],
    calibration_short: Input[Dataset],
    ranking: Output[Artifact],
    metrics: Output[Metrics],
):
    """Orders the experts of every layer, and the channels of every expert, by importance, in one streaming pass
    over calibration data.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "rank_experts",
        config,
        inputs={
            "parent": parent,
            "calibration_short": calibration_short,
        },
        outputs={
            "ranking": ranking,
            "metrics": metrics,
        },
    )

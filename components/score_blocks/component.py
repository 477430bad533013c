"""Kubeflow component of the stage `score_blocks`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def score_blocks(
    config: str,
    version: str,
    parent: Input[Model],
    ranking: Input[Artifact],
    calibration_short: Input[Dataset],
    calibration_long: Input[Dataset],
    scores: Output[Artifact],
    metrics: Output[Metrics],
):
    """Replaces one block at a time by every variant and measures the damage at the model's output, in short and
    in long contexts.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "score_blocks",
        config,
        inputs={
            "parent": parent,
            "ranking": ranking,
            "calibration_short": calibration_short,
            "calibration_long": calibration_long,
        },
        outputs={
            "scores": scores,
            "metrics": metrics,
        },
    )

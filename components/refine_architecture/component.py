"""Kubeflow component of the stage `refine_architecture`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def refine_architecture(
    config: str,
    version: str,
    parent: Input[Model],
    ranking: Input[Artifact],
    scores: Input[Artifact],
    costs: Input[Artifact],
    architecture: Input[Artifact],
    calibration_short: Input[Dataset],
    calibration_long: Input[Dataset],
    refined: Output[Artifact],
    metrics: Output[Metrics],
) -> list[str]:
    """Runs the best assemblies whole, learns how the damages of their blocks interact, and solves again, until
    its evaluations are spent.
    """
    from moesaic.platform.runs.runtime import baselines_of, run_stage

    run_stage(
        "refine_architecture",
        config,
        inputs={
            "parent": parent,
            "ranking": ranking,
            "scores": scores,
            "costs": costs,
            "architecture": architecture,
            "calibration_short": calibration_short,
            "calibration_long": calibration_long,
        },
        outputs={
            "refined": refined,
            "metrics": metrics,
        },
    )
    return baselines_of(refined.path)

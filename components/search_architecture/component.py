"""Kubeflow component of the stage `search_architecture`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def search_architecture(
    config: str,
    version: str,
    parent: Input[Model],
    scores: Input[Artifact],
    costs: Input[Artifact],
    architecture: Output[Artifact],
    metrics: Output[Metrics],
):
    """Solves for one block per layer with the least damage under all limits at once; sweeps the frontier and
    makes baselines of equal budget.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "search_architecture",
        config,
        inputs={
            "parent": parent,
            "scores": scores,
            "costs": costs,
        },
        outputs={
            "architecture": architecture,
            "metrics": metrics,
        },
    )

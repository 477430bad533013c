"""Kubeflow component of the stage `prune_model`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def prune_model(
    config: str,
    version: str,
    parent: Input[Model],
    ranking: Input[Artifact],
    architecture: Input[Artifact],
    child: Output[Model],
    metrics: Output[Metrics],
):
    """Assemble a candidate's checkpoint from the parent's weights."""
    from moesaic.runtime import run_stage

    run_stage(
        "prune_model",
        config,
        inputs={"parent": parent, "ranking": ranking, "architecture": architecture},
        outputs={"child": child, "metrics": metrics},
    )

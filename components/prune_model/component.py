"""Kubeflow component of the stage `prune_model`, written by `make compile`."""

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
    """Assembles a candidate's checkpoint from the parent's weights; kept experts are byte-exact, but for the
    second projection of narrower ones, which is packed anew.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "prune_model",
        config,
        inputs={
            "parent": parent,
            "ranking": ranking,
            "architecture": architecture,
        },
        outputs={
            "child": child,
            "metrics": metrics,
        },
    )

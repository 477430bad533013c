"""Kubeflow component of the stage `search_architecture`."""

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
) -> list[str]:
    """Choose one block per layer under all limits; return the pruning configs of the baselines."""
    from moesaic.runtime import baselines_of, run_stage

    run_stage(
        "search_architecture",
        config,
        inputs={"parent": parent, "scores": scores, "costs": costs},
        outputs={"architecture": architecture, "metrics": metrics},
    )
    return baselines_of(architecture.path)

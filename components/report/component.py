"""Kubeflow component of the stage `report`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def report(
    config: str,
    version: str,
    ranking: Input[Artifact],
    scores: Input[Artifact],
    costs: Input[Artifact],
    architecture: Input[Artifact],
    evaluation_parent: Input[Artifact],
    evaluation_child: Input[Artifact],
    baselines: Input[list[Artifact]],
    measurements: Input[Artifact],
    report: Output[Artifact],
    metrics: Output[Metrics],
    recovery: Input[Artifact] | None = None,
    recovery_baseline: Input[Artifact] | None = None,
    evaluation_parent_fp8: Input[Artifact] | None = None,
    measurements_baseline: Input[Artifact] | None = None,
    serving: Input[Artifact] | None = None,
):
    """Makes one self-contained page with its pictures, and the summary that the command line prints."""
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "report",
        config,
        inputs={
            "ranking": ranking,
            "scores": scores,
            "costs": costs,
            "architecture": architecture,
            "evaluation_parent": evaluation_parent,
            "evaluation_child": evaluation_child,
            "baselines": baselines,
            "measurements": measurements,
            "recovery": recovery,
            "recovery_baseline": recovery_baseline,
            "evaluation_parent_fp8": evaluation_parent_fp8,
            "measurements_baseline": measurements_baseline,
            "serving": serving,
        },
        outputs={
            "report": report,
            "metrics": metrics,
        },
    )

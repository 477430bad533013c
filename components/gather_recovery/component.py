"""Kubeflow component of the stage `gather_recovery`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def gather_recovery(
    config: str,
    version: str,
    traces: Input[Dataset],
    distilled: Input[Model],
    evaluation_pruned: Input[Artifact],
    evaluation_distilled: Input[Artifact],
    evaluations_policies: Input[list[Artifact]],
    evaluation_averaged: Input[Artifact],
    evaluation_fp8_unit: Input[Artifact],
    evaluation_fp8: Input[Artifact],
    recovery: Output[Artifact],
    metrics: Output[Metrics],
):
    """Collects the evaluations after each stage of one model's recovery, its traces' summary and its training
    curve.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "gather_recovery",
        config,
        inputs={
            "traces": traces,
            "distilled": distilled,
            "evaluation_pruned": evaluation_pruned,
            "evaluation_distilled": evaluation_distilled,
            "evaluations_policies": evaluations_policies,
            "evaluation_averaged": evaluation_averaged,
            "evaluation_fp8_unit": evaluation_fp8_unit,
            "evaluation_fp8": evaluation_fp8,
        },
        outputs={
            "recovery": recovery,
            "metrics": metrics,
        },
    )

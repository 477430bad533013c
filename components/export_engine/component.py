"""Kubeflow component of the stage `export_engine`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.SEARCH, install_kfp_package=False)
def export_engine(
    config: str,
    version: str,
    child: Input[Model],
    bundle: Output[Model],
    metrics: Output[Metrics],
):
    """A deployment bundle for TensorRT-LLM or vLLM: the checkpoint as that engine reads it, its model module,
    its settings, and a manifest of every file; files and layout are checked, no engine loads it.
    """
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "export_engine",
        config,
        inputs={
            "child": child,
        },
        outputs={
            "bundle": bundle,
            "metrics": metrics,
        },
    )

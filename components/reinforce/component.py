"""Kubeflow component of the stage `reinforce`, written by `make compile`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.RL, install_kfp_package=False)
def reinforce(
    config: str,
    version: str,
    model: Input[Model],
    prompts: Input[Dataset],
    traces: Input[Dataset],
    policy: Output[Model],
    metrics: Output[Metrics],
):
    """GRPO on TRL, or on NeMo-RL with `engine: nemo_rl`."""
    from moesaic.platform.runs.runtime import run_stage

    run_stage(
        "reinforce",
        config,
        inputs={
            "model": model,
            "prompts": prompts,
            "traces": traces,
        },
        outputs={
            "policy": policy,
            "metrics": metrics,
        },
    )

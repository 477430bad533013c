"""The recovery of one pruned child, measured after every stage.

    fit_routers -> distill_blocks -> distill -> reinforce[policy 1] -+-> average_checkpoints -> calibrate_kv
                                             -> reinforce[policy 2] -+

The paper trains two policies; any number is a list of configs here, trained in parallel.
"""

from dataclasses import dataclass
from typing import Any

from kfp import dsl

from components.average_checkpoints.component import average_checkpoints
from components.calibrate_kv.component import calibrate_kv
from components.distill.component import distill
from components.distill_blocks.component import distill_blocks
from components.evaluate.component import evaluate
from components.fit_routers.component import fit_routers
from components.gather_recovery.component import gather_recovery
from components.reinforce.component import reinforce


@dataclass(frozen=True)
class LearningConfigs:
    """Of what learns from the parent: layer by layer, then the whole child."""

    fit_routers: Any
    distill_blocks: Any
    distill: Any


@dataclass(frozen=True)
class RecoveryConfigs:
    """Pipeline parameters: one config, as JSON, for each of the stages; ``version`` is the code's."""

    version: Any
    learning: LearningConfigs
    policies: Any
    """A list of configs of ``reinforce``."""
    average_checkpoints: Any
    calibrate_kv: Any
    evaluate: Any
    evaluate_fp8_unit: Any
    evaluate_fp8: Any
    gather_recovery: Any


@dataclass(frozen=True)
class Material:
    """What every recovery learns from and is measured on."""

    parent: Any
    traces: Any
    prompts: Any
    calibration: Any
    tests: Any


@dataclass(frozen=True)
class Recovered:
    """What the tasks of :func:`recover` hand on."""

    child: Any
    recovery: Any


def recover(configs: RecoveryConfigs, material: Material, pruned: Any, evaluation_pruned: Any) -> Recovered:
    """Add the tasks to the pipeline that is being described."""
    version, traces = configs.version, material.traces

    def measure(model: Any, config: Any = configs.evaluate) -> Any:
        return evaluate(config=config, version=version, model=model, tests=material.tests).outputs["evaluation"]

    distilled = learn(version, configs.learning, pruned, material)
    evaluation_distilled = measure(distilled)
    with dsl.ParallelFor(configs.policies) as policy_config:
        policy = reinforce(
            config=policy_config, version=version, model=distilled, prompts=material.prompts, traces=traces
        ).outputs["policy"]
        evaluation_policy = measure(policy)
    averaged = average_checkpoints(
        config=configs.average_checkpoints, version=version, policies=dsl.Collected(policy)
    ).outputs["averaged"]
    calibrated = calibrate_kv(
        config=configs.calibrate_kv, version=version, model=averaged, calibration=material.calibration
    ).outputs["calibrated"]
    gathered = gather_recovery(
        config=configs.gather_recovery,
        version=version,
        traces=traces,
        distilled=distilled,
        evaluation_pruned=evaluation_pruned,
        evaluation_distilled=evaluation_distilled,
        evaluations_policies=dsl.Collected(evaluation_policy),
        evaluation_averaged=measure(averaged),
        evaluation_fp8_unit=measure(calibrated, configs.evaluate_fp8_unit),
        evaluation_fp8=measure(calibrated, configs.evaluate_fp8),
    )
    return Recovered(child=calibrated, recovery=gathered.outputs["recovery"])


def learn(version: Any, configs: LearningConfigs, child: Any, material: Material) -> Any:
    """Add the tasks of the routers' fit, and of local and global distillation; the distilled checkpoint."""
    given = {"version": version, "parent": material.parent, "calibration": material.calibration}
    routed = fit_routers(config=configs.fit_routers, child=child, **given)
    local = distill_blocks(config=configs.distill_blocks, child=routed.outputs["fitted"], **given)
    return distill(
        config=configs.distill,
        version=version,
        child=local.outputs["trained"],
        parent=material.parent,
        traces=material.traces,
    ).outputs["trained"]

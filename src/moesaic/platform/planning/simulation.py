"""Peaks of stages at true size, simulated: their own functions on tensors without values, without a GPU.

Which stages have a simulation is said here. Generation by an engine, reinforcement and the benchmarks have none: a plan
has their memory by formulas, the engines' own where there are some.
"""

from typing import Any

from moesaic.costs.facts import Facts, PipelineTask
from moesaic.models.architecture import Architecture
from moesaic.models.peak import Peak
from moesaic.recover.distill.needs import GPUS_PER_NODE, simulated_peak
from moesaic.recover.distill.stage import DistillConfig

STREAMED = ("rank_experts", "score_blocks", "refine_architecture", "calibrate_kv")
"""Stages in which a model goes through a device layer by layer."""


def simulated(task: PipelineTask[Any], facts: Facts, model: Architecture) -> Peak | None:
    """The most that a task holds on a device; None if its stage has no simulation. The first of a kind takes a minute.

    Args:
        task: of the pipeline.
        facts: what is planned for; without modelled hardware a CPU computes, and a step of distill is not simulated.
        model: what the task takes.

    Raises:
        ConfigError: if AutoModel, which is part of distill's step, is not installed.
    """
    if task.stage in STREAMED:
        peak: Peak = _streamed(task.stage)(task.config, facts.shape, model, facts.packed, facts.target is not None)
        return peak
    if isinstance(task.config, DistillConfig) and task.config.steps and facts.target is not None:
        return simulated_peak(task.config, facts, facts.training_gpus // GPUS_PER_NODE)
    return None


def _streamed(stage: str) -> Any:
    from moesaic.recover.calibrate_kv.simulated_memory import calibration_peak  # these load torch
    from moesaic.search.simulated_memory import ranking_peak, refinement_peak, scoring_peak

    return dict(zip(STREAMED, (ranking_peak, scoring_peak, refinement_peak, calibration_peak), strict=True))[stage]

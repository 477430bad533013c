"""What recipe and cluster profile say of each other, checked before anything is uploaded or run."""

from collections.abc import Iterator, Sequence
from typing import Any

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError
from moesaic.costs.facts import PipelineTask, Placement
from moesaic.platform.cluster.profile import ClusterProfile
from moesaic.stages import find_stage

_ENGINE_RUNTIME = "serve"
"""The runtime whose image has TensorRT-LLM."""


def check_agreement(tasks: Sequence[PipelineTask[Config]], profile: ClusterProfile) -> None:
    """Check that the cluster's nodes, jobs and images can run the tasks of a pipeline.

    Args:
        tasks: of the pipeline, with the recipe's configs.
        profile: of the cluster.

    Raises:
        ConfigError: with everything that cannot work, each with the task that it concerns.
    """
    exports = tuple(task.config for task in tasks if task.stage == "export_engine")
    problems = [f"{task.name}: {problem}" for task in tasks for problem in _problems(task, exports, profile)]
    if problems:
        raise ConfigError("\n  ".join(["recipe and cluster profile do not go together:", *dict.fromkeys(problems)]))


def _problems(task: PipelineTask[Config], exports: tuple[Any, ...], profile: ClusterProfile) -> Iterator[str]:
    """What keeps one task from running on the cluster, by its stage's own rule."""
    stage = find_stage(task.stage)
    if check := stage.planned_by("check_placement"):
        placement = Placement(
            stage=task.stage,
            num_gpus=profile.num_gpus(task.stage),
            num_processes=profile.num_processes(task.stage),
            on_job=task.stage in profile.jobs,
            has_tensorrt_llm=stage.runtime == _ENGINE_RUNTIME or task.stage in profile.images,
            exports=exports,
        )
        try:
            check(task.config, placement)
        except ConfigError as problem:
            yield str(problem)

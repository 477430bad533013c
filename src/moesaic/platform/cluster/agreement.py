"""What recipe and cluster profile say of each other, checked before anything is uploaded or run."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError
from moesaic.costs.facts import PipelineTask
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.measure.benchmark_serving.stage import BenchmarkServingConfig
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.platform.cluster.profile import ClusterProfile
from moesaic.recover.distill.stage import DistillConfig, check_batch
from moesaic.recover.generate_traces.stage import GenerateTracesConfig
from moesaic.recover.reinforce.stage import ReinforceConfig, check_placement
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
    problems = [f"{task.name}: {problem}" for task in tasks for problem in _problems(task, tasks, profile)]
    if problems:
        raise ConfigError("\n  ".join(["recipe and cluster profile do not go together:", *dict.fromkeys(problems)]))


def _problems(
    task: PipelineTask[Config], tasks: Iterable[PipelineTask[Config]], profile: ClusterProfile
) -> Iterator[str]:
    """What keeps one task from running on the cluster."""
    config, stage = task.config, task.stage
    checks = []
    if isinstance(config, DistillConfig):
        checks.append(partial(check_batch, config, profile.num_processes(stage)))
    if isinstance(config, ReinforceConfig):
        checks.append(partial(check_placement, config, profile.num_gpus(stage), stage in profile.jobs))
    if isinstance(config, EvaluateConfig | GenerateTracesConfig) and config.bundle:
        checks.append(partial(_check_engine, stage, config.engine, config.bundle, profile))
    if isinstance(config, BenchmarkServingConfig):
        exports = (one.config for one in tasks if isinstance(one.config, ExportEngineConfig))
        checks += [partial(_check_engine, stage, config.engine, export, profile) for export in exports]
    for check in checks:
        try:
            check()
        except ConfigError as problem:
            yield str(problem)


def _check_engine(stage: str, engine: str, bundle: ExportEngineConfig, profile: ClusterProfile) -> None:
    """Raise ConfigError if the image has no TensorRT-LLM, or the node fewer GPUs than share the bundle's layers."""
    if engine not in ("tensorrt_llm", "vllm"):
        return
    if engine == "tensorrt_llm" and find_stage(stage).runtime != _ENGINE_RUNTIME and stage not in profile.images:
        raise ConfigError(
            f"engine '{engine}' is not in the image of {stage}; name {_ENGINE_RUNTIME}'s image for it under `images`, "
            "or choose another engine"
        )
    gpus, needed = profile.num_gpus(stage), bundle.tensor_parallel_size
    if gpus < needed and (engine == "tensorrt_llm" or needed > 1):
        raise ConfigError(
            f"engine '{engine}' needs tensor_parallel_size {needed} GPUs, and the node of {stage} has {gpus}; "
            "choose a larger kind of node under `stages`, or a smaller tensor_parallel_size"
        )

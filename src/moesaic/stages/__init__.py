"""The stages: each reads files, calls the method and writes one directory. This table says what each one takes."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from moesaic import configs
from moesaic.errors import ConfigError

Metrics = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """What the runtime must know of a stage; importing the table imports none of their modules."""

    name: str
    config: type[configs.Config]
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """Inputs it does without."""
    lists: tuple[str, ...] = ()
    """Those of its inputs that are any number of directories."""
    outputs: tuple[str, ...] = ()
    """Names of the artifacts it hands on: one is the output directory itself, several are folders inside it."""
    makes_weights: bool = False
    """Whether its output goes to the store, and only a manifest on to the next stage."""
    trains: bool = False
    """Whether its MLflow run exists from the start, so that its engine can log the curve as it grows."""
    reads_store: bool = False
    """Whether it also takes the store's directory, as ``store``."""
    reads_registry: bool = False
    """Whether it also takes the address of the model registry, as ``registry``."""
    by_manifest: tuple[str, ...] = ()
    """Inputs of which it takes the manifest as it is; their files stay in the store."""

    @property
    def run(self) -> Callable[..., Metrics]:
        """The stage's function; its module is imported now."""
        function: Callable[..., Metrics] = import_module(f"moesaic.stages.{self.name}").run
        return function


_SETS = ("calibration_short", "calibration_long")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("ingest", configs.IngestConfig, outputs=("parent", *_SETS, "prompts", "tests"), reads_store=True),
        Stage("rank_experts", configs.RankExpertsConfig, ("parent", "calibration_short"), outputs=("ranking",)),
        Stage("score_blocks", configs.ScoreBlocksConfig, ("parent", "ranking", *_SETS), outputs=("scores",)),
        Stage("measure_costs", configs.MeasureCostsConfig, ("parent",), outputs=("costs",)),
        Stage(
            "search_architecture",
            configs.SearchArchitectureConfig,
            ("parent", "scores", "costs"),
            outputs=("architecture",),
        ),
        Stage(
            "prune_model",
            configs.PruneModelConfig,
            ("parent", "ranking", "architecture"),
            outputs=("child",),
            makes_weights=True,
        ),
        Stage("generate_traces", configs.GenerateTracesConfig, ("model", "prompts"), outputs=("traces",)),
        Stage(
            "distill_blocks",
            configs.DistillBlocksConfig,
            ("child", "parent", "calibration"),
            outputs=("trained",),
            makes_weights=True,
            trains=True,
        ),
        Stage(
            "distill",
            configs.DistillConfig,
            ("child", "parent", "traces"),
            outputs=("trained",),
            makes_weights=True,
            trains=True,
        ),
        Stage(
            "reinforce",
            configs.ReinforceConfig,
            ("model", "prompts", "traces"),
            outputs=("policy",),
            makes_weights=True,
            trains=True,
        ),
        Stage(
            "average_checkpoints",
            configs.AverageCheckpointsConfig,
            ("policies",),
            lists=("policies",),
            outputs=("averaged",),
            makes_weights=True,
        ),
        Stage(
            "calibrate_kv",
            configs.CalibrateKvConfig,
            ("model", "calibration"),
            outputs=("calibrated",),
            makes_weights=True,
        ),
        Stage("evaluate", configs.EvaluateConfig, ("model", "tests"), outputs=("evaluation",)),
        Stage(
            "gather_recovery",
            configs.GatherRecoveryConfig,
            (
                "traces",
                "distilled",
                "evaluation_pruned",
                "evaluation_distilled",
                "evaluations_policies",
                "evaluation_averaged",
                "evaluation_fp8_unit",
                "evaluation_fp8",
            ),
            lists=("evaluations_policies",),
            outputs=("recovery",),
        ),
        Stage(
            "export_engine",
            configs.ExportEngineConfig,
            ("child",),
            outputs=("bundle",),
            makes_weights=True,
        ),
        Stage("benchmark", configs.BenchmarkConfig, ("parent", "child"), outputs=("measurements",)),
        Stage("benchmark_serving", configs.BenchmarkServingConfig, ("parent", "child"), outputs=("serving",)),
        Stage(
            "report",
            configs.ReportConfig,
            (
                "ranking",
                "scores",
                "costs",
                "architecture",
                "evaluation_parent",
                "evaluation_child",
                "baselines",
                "measurements",
            ),
            optional=("recovery", "recovery_baseline", "evaluation_parent_fp8", "measurements_baseline", "serving"),
            lists=("baselines",),
            outputs=("report",),
        ),
        Stage(
            "promote",
            configs.PromoteConfig,
            ("child", "report"),
            optional=("bundle",),
            outputs=("promotion",),
            reads_store=True,
            reads_registry=True,
            by_manifest=("child", "bundle"),
        ),
    )
}


def find_stage(name: str) -> Stage:
    """The stage of this name; ConfigError names those there are."""
    if name not in STAGES:
        raise ConfigError(f"there is no stage {name!r}; choose one of {', '.join(STAGES)}")
    return STAGES[name]

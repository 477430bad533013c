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
    outputs: tuple[str, ...] = ()
    """Names of the artifacts it hands on: one is the output directory itself, several are folders inside it."""
    makes_weights: bool = False
    """Whether its output goes to the store, and only a manifest on to the next stage."""
    reads_store: bool = False
    """Whether it also takes the store's directory, as ``store``."""

    @property
    def run(self) -> Callable[..., Metrics]:
        """The stage's function; its module is imported now."""
        function: Callable[..., Metrics] = import_module(f"moesaic.stages.{self.name}").run
        return function


_SETS = ("calibration_short", "calibration_long")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("ingest", configs.IngestConfig, (), ("parent", *_SETS, "tests"), reads_store=True),
        Stage("rank_experts", configs.RankExpertsConfig, ("parent", "calibration_short"), ("ranking",)),
        Stage("score_blocks", configs.ScoreBlocksConfig, ("parent", "ranking", *_SETS), ("scores",)),
        Stage("measure_costs", configs.MeasureCostsConfig, ("parent",), ("costs",)),
        Stage(
            "search_architecture", configs.SearchArchitectureConfig, ("parent", "scores", "costs"), ("architecture",)
        ),
        Stage(
            "prune_model",
            configs.PruneModelConfig,
            ("parent", "ranking", "architecture"),
            ("child",),
            makes_weights=True,
        ),
        Stage("evaluate", configs.EvaluateConfig, ("model", "tests"), ("evaluation",)),
        Stage("benchmark", configs.BenchmarkConfig, ("parent", "child"), ("measurements",)),
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
            ("report",),
        ),
    )
}


def find_stage(name: str) -> Stage:
    """The stage of this name; ConfigError names those there are."""
    if name not in STAGES:
        raise ConfigError(f"there is no stage {name!r}; choose one of {', '.join(STAGES)}")
    return STAGES[name]

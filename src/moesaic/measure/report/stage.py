"""Makes one self-contained page with its pictures, and the summary that the command line prints."""

from moesaic.core.config import Config
from moesaic.core.stage import Stage, artifact


class ReportConfig(Config):
    """The report page."""

    title: str = "Moesaic report"
    """Its heading."""


STAGE = Stage(
    name="report",
    config=ReportConfig,
    runtime="search",
    inputs=(
        artifact("ranking", "expert importance"),
        artifact("scores", "damage"),
        artifact("costs", "predicted costs"),
        artifact("architecture", "child, frontier, baselines"),
        artifact("evaluation_parent", "the parent's accuracy"),
        artifact("evaluation_child", "the child's accuracy"),
        artifact("baselines", "evaluations of the baselines", many=True),
        artifact("measurements", "measured speed"),
        artifact("recovery", "gather_recovery's output for the child", optional=True),
        artifact("recovery_baseline", "the same for the uniformly pruned child", optional=True),
        artifact("evaluation_parent_fp8", "the parent with a calibrated FP8 cache", optional=True),
        artifact("measurements_baseline", "speed of the parent and the uniformly pruned child", optional=True),
        artifact("serving", "benchmark_serving's sweeps through a server", optional=True),
    ),
    outputs=(artifact("report", "`report.html`, pictures, `summary.json`"),),
)

"""Collects the evaluations after each stage of one model's recovery, its traces' summary and its training curve."""

from moesaic.core.config import Config
from moesaic.core.stage import Stage, artifact, dataset, model


class GatherRecoveryConfig(Config):
    """What one model's recovery was, stage by stage."""


STAGE = Stage(
    name="gather_recovery",
    config=GatherRecoveryConfig,
    runtime="search",
    inputs=(
        dataset("traces", "output of generate_traces"),
        model("distilled", "with its `training.jsonl`"),
        artifact("evaluation_pruned", "before recovery"),
        artifact("evaluation_distilled", "after distillation"),
        artifact("evaluations_policies", "one per policy", many=True),
        artifact("evaluation_averaged", "of the policies' mean"),
        artifact("evaluation_fp8_unit", "with an FP8 cache without scales"),
        artifact("evaluation_fp8", "with a calibrated FP8 cache"),
    ),
    outputs=(artifact("recovery", "`recovery.json`"),),
)

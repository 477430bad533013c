"""Whether the tasks of a pipeline can work on a run's inputs, asked before the first of them begins."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError, MoesaicError
from moesaic.costs.facts import PipelineTask
from moesaic.data.sets import DataSets
from moesaic.stages import find_stage

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def check_inputs(tasks: Sequence[PipelineTask[Config]], parent: Path, data: DataSets) -> None:
    """Ask every stage that has a rule for the parent and the data sets.

    Args:
        tasks: of the pipeline, with the recipe's configs.
        parent: a checkpoint that can be opened.
        data: sets that can be read.

    Raises:
        ConfigError: with everything that cannot work, each with the task that it concerns.
    """
    from moesaic.data.inputs import Inputs  # it loads torch
    from moesaic.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(parent)
    exports: list[Any] = [task.config for task in tasks if task.stage == "export_engine"]
    served = [export.max_seq_len for export in exports if export.max_seq_len]
    inputs = Inputs(checkpoint, data, min([*served, checkpoint.shape.max_positions]))
    different = {(task.stage, task.config.to_json()): task for task in tasks}
    if problems := [problem for task in different.values() for problem in _problems(task, inputs)]:
        raise ConfigError("\n  ".join(["recipe and inputs do not go together:", *problems]))


def _problems(task: PipelineTask[Config], inputs: "Inputs") -> Iterator[str]:
    """What one task cannot work on, by its stage's own rule."""
    if check := find_stage(task.stage).planned_by("check_inputs"):
        try:
            check(task.config, inputs)
        except MoesaicError as problem:
            yield f"{task.name}: {problem}"

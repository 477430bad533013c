"""What benchmarks of the search share: rows of the calibration sets, and what a pruned child answers."""

import json
from collections.abc import Iterable
from pathlib import Path

from moesaic.core.workbench import Workbench
from moesaic.data.sets import DataSets
from moesaic.measure.paired import Verdicts
from moesaic.pipelines import example
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.stages import STAGES

PARENT, DATA = example() / "parent", DataSets.at(example() / "data")


def calibration_rows(directory: Path, rows: Iterable[int]) -> DataSets:
    """The rows of these numbers of both calibration sets, as files; those that are there are taken as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = list(rows)
    for path in (DATA.calibration_short, DATA.calibration_long):
        target = directory / path.name
        if not target.is_file():
            lines = path.read_text().splitlines(keepends=True)
            target.write_text("".join(lines[number] for number in numbers if number < len(lines)))
    return DataSets.at(directory)


def ask_pruned(
    bench: Workbench, name: str, ranking: Path, architecture: Path, problems_per_task: int = 200
) -> dict[str, Verdicts]:
    """By effort, which validation problems the candidate ``puzzle`` solves before any training."""
    child = bench.run(
        STAGES["prune_model"],
        tiny_cpu().prune_model,
        f"child-{name}",
        parent=PARENT,
        ranking=ranking,
        architecture=architecture,
    )
    return ask(bench, name, child, problems_per_task)


def ask(bench: Workbench, name: str, child: Path, problems_per_task: int = 200) -> dict[str, Verdicts]:
    """By effort, which validation problems a checkpoint solves."""
    evaluation = bench.run(
        STAGES["evaluate"],
        tiny_cpu().evaluate.but(problems_per_task=problems_per_task, split="validation"),
        f"evaluation-{name}",
        model=child,
        tests=example() / "data" / "validation.jsonl",
    )
    efforts = json.loads((evaluation / "evaluation.json").read_text())["efforts"]
    return {
        effort: {task: entry["solved"] for task, entry in result["tasks"].items()} for effort, result in efforts.items()
    }

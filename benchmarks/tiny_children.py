"""What benchmarks of the search share: rows of the calibration sets, KL on them, and what a pruned child answers."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.core.workbench import Workbench
from moesaic.data.sets import DataSets
from moesaic.measure.paired import Verdicts
from moesaic.models import loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import run_block
from moesaic.pipelines import example
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.search.probing import Probes
from moesaic.search.score_blocks.damage import compare, finish
from moesaic.stages import STAGES

PARENT, DATA = example() / "parent", DataSets.at(example() / "data")
VALIDATION = example() / "data" / "validation.jsonl"
SEQUENCES = 32
"""Of a draw, from each calibration set."""
_DAMAGE = tiny_cpu().score_blocks.but(max_long_tokens=512)


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


def draw_rows(directory: Path, draw: int) -> DataSets:
    """The rows of both calibration sets that make a draw."""
    return calibration_rows(directory / f"draw-{draw}", range(draw * SEQUENCES, (draw + 1) * SEQUENCES))


def draw_probes(directory: Path, draw: int) -> Probes:
    """The tokens of a draw, long conversations cut."""
    data = draw_rows(directory, draw)
    sets = data.calibration_short, data.calibration_long
    return Probes.read(_DAMAGE, Checkpoint.open(PARENT), *sets, _DAMAGE.space.windows, _DAMAGE.variants_per_batch)


@torch.no_grad()
def final_states(model: Path, probes: Probes) -> list[Tensor]:
    """A checkpoint's final hidden states at the measured tokens of every probe, [token hidden]."""
    checkpoint = Checkpoint.open(model)
    rotary = loading.rotary(checkpoint, max(probe.batch.num_positions for probe in probes.all))
    states = loading.embed(checkpoint, [probe.batch.token_ids for probe in probes.all])
    for layer, block in enumerate(checkpoint.architecture.blocks):
        module = loading.load_block(checkpoint, layer)
        states = [run_block(module, each, rotary, block.window) for each in states]
    head = loading.load_head(checkpoint)
    return [head.normed(each[probe.measured]) for each, probe in zip(states, probes.all, strict=True)]


def kl(child: Path, probes: Probes, references: Sequence[Tensor]) -> float:
    """On short and on long conversations, as the search counts it; ``references`` are the parent's final states."""
    head = loading.load_head(Checkpoint.open(PARENT))
    sums = [
        compare(head, reference, states.unsqueeze(0), probe.next_ids, probe.weights)[0]
        for probe, reference, states in zip(probes.all, references, final_states(child, probes), strict=True)
    ]
    short = len(probes.short)
    return sum(finish(torch.stack(parts).sum(0))["kl"] for parts in (sums[:short], sums[short:]))


def ask_pruned(bench: Workbench, name: str, ranking: Path, architecture: Path) -> dict[str, Verdicts]:
    """By effort, which of 200 validation problems a task the candidate ``puzzle`` solves before any training."""
    return ask(bench, name, prune(bench, name, ranking, architecture))


def prune(bench: Workbench, name: str, ranking: Path, architecture: Path) -> Path:
    """The checkpoint of the candidate ``puzzle``."""
    return bench.run(
        STAGES["prune_model"],
        tiny_cpu().prune_model,
        f"child-{name}",
        parent=PARENT,
        ranking=ranking,
        architecture=architecture,
    )


def ask(
    bench: Workbench, name: str, child: Path, problems_per_task: int = 200, tests: Path = VALIDATION
) -> dict[str, Verdicts]:
    """By effort, which problems a checkpoint solves."""
    config = tiny_cpu().evaluate.but(problems_per_task=problems_per_task, split="validation")
    evaluation = bench.run(STAGES["evaluate"], config, f"evaluation-{name}", model=child, tests=tests)
    efforts = json.loads((evaluation / "evaluation.json").read_text())["efforts"]
    return {
        effort: {task: entry["solved"] for task, entry in result["tasks"].items()} for effort, result in efforts.items()
    }

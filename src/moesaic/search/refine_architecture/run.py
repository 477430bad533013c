"""Measure the search's choice and better ones whole, and write the best into ``architecture.json``."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.core.errors import ConfigError
from moesaic.core.files import write_text_atomically
from moesaic.core.process_group import BatchShare, share
from moesaic.core.progress import count_steps
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.stage_outputs import read_json
from moesaic.search.library import Choice, total
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.refine_architecture.assemblies import run_assemblies
from moesaic.search.refine_architecture.interactions import Evaluation, LearntDamage
from moesaic.search.refine_architecture.refinement import propose
from moesaic.search.refine_architecture.stage import RefineArchitectureConfig
from moesaic.search.score_blocks.run import choose_variants
from moesaic.search.score_blocks.scoring import Measurement, OnSteps, Parent, Variant, run_parent
from moesaic.search.score_blocks.scoring import total as total_metrics
from moesaic.search.search_architecture.run import ARCHITECTURE, describe, read_search
from moesaic.search.search_architecture.search import Search
from moesaic.search.search_architecture.stage import SearchArchitectureConfig

UNREFINED = "unrefined"
"""The candidate that the search chose by the sum of damages."""
RIVALS = ("greedy", "uniform")
"""Baselines that are measured too, so that all compare by what was measured."""


@dataclass(frozen=True)
class _Job:
    """Everything that refinement needs, read and checked."""

    config: RefineArchitectureConfig
    checkpoint: Checkpoint
    search: Search
    candidates: Mapping[str, Choice]
    """What the search found, its own choice first."""
    variants: Sequence[Sequence[Variant]]
    """By layer, in the order of the search's library."""
    probes: Probes

    def assembly(self, choice: Choice) -> tuple[Variant, ...]:
        """A choice as the blocks to run."""
        return tuple(options[index] for options, index in zip(self.variants, choice, strict=True))


def run(config: RefineArchitectureConfig, *, output: Path, scratch: Path, **inputs: Path) -> dict[str, float]:
    """Write ``architecture.json``. Assemblies that ``scratch`` holds are not measured again."""
    job = _prepare(config, **inputs)
    if not share(config, inputs, scratch, len(job.probes.all)):
        _refine(job, scratch, BatchShare())
    measured = _saved(scratch)
    best = min(measured, key=lambda row: row["measured"])
    content = read_json(inputs["architecture"] / ARCHITECTURE)
    (output / ARCHITECTURE).write_text(json.dumps(_refined(job, content, measured, best), indent=1) + "\n")
    first = measured[0]
    return {
        "evaluations": float(len(measured)),
        "damage_measured": best["measured"],
        "damage_measured_unrefined": first["measured"],
        "damage_sum": best["sum"],
        "damage_sum_unrefined": first["sum"],
    }


def work(config: RefineArchitectureConfig, *, scratch: Path, batch_share: BatchShare, **inputs: Path) -> None:
    """Take part in refinement, as one of several processes; the first one proposes."""
    _refine(_prepare(config, **inputs), scratch, batch_share)


def _prepare(
    config: RefineArchitectureConfig,
    *,
    parent: Path,
    ranking: Path,
    scores: Path,
    costs: Path,
    architecture: Path,
    calibration_short: Path,
    calibration_long: Path,
) -> _Job:
    """Read and check everything but weights."""
    _check_alike(config, scores / "scores.json")
    content = read_json(architecture / ARCHITECTURE)
    search = read_search(SearchArchitectureConfig.model_validate(content["config"]), parent, scores, costs)
    checkpoint = Checkpoint.open(parent)
    library = search.library
    variants = choose_variants(library.variants, checkpoint, ranking)
    full = [options for options, own in zip(library.variants, library.parent.blocks, strict=True) if own.window is None]
    windows = sorted({block.window for options in full for block in options if block.window is not None})
    probes = Probes.read(config, checkpoint, calibration_short, calibration_long, windows, config.assemblies_per_round)
    candidates = {
        name: library.choice(Architecture.of(Block.from_config(entry) for entry in candidate["blocks"]))
        for name, candidate in content["candidates"].items()
    }
    return _Job(config, checkpoint, search, candidates, variants, probes)


def _check_alike(config: RefineArchitectureConfig, scores: Path) -> None:
    content = read_json(scores)
    for name in ("metric", "balance", "long_weight"):
        if content[name] != getattr(config, name):
            raise ConfigError(
                f"refine_architecture has {name} {getattr(config, name)!r}, the scores were made with "
                f"{content[name]!r}; sums of scores and whole assemblies could not be compared, so use the same"
            )


def _refine(job: _Job, scratch: Path, batch_share: BatchShare) -> None:
    """Measure, propose and save, round by round."""
    measured, config = _saved(scratch), job.config
    if len(measured) >= config.evaluations:
        return
    layers, probes = job.checkpoint.num_layers, batch_share.mine(job.probes.all)
    num_steps = layers * (1 + config.evaluations)
    shown = count_steps(num_steps, "measuring assemblies") if batch_share.rank == 0 else nullcontext(lambda _: None)
    with open_parent(config, job.checkpoint, job.probes, scratch, batch_share) as parent, shown as on_steps:
        measurements = run_parent(parent, embed(config, job.checkpoint, parent, probes), probes, on_steps)
        on_steps(len(measured) * layers)
        while choices := batch_share.gather([_next(job, measured) if batch_share.rank == 0 else []])[0]:
            measured += _measure(job, parent, measurements, choices, measured, batch_share, on_steps)
            if batch_share.rank == 0:
                write_text_atomically(_file(scratch), json.dumps(measured) + "\n")


def _next(job: _Job, measured: Sequence[dict[str, Any]]) -> list[Choice]:
    """What to measure in the next round: first the search's own choice and its rivals, then what is most promising."""
    count = min(job.config.assemblies_per_round, job.config.evaluations - len(measured))
    known = {tuple(row["choice"]) for row in measured}
    named = [job.candidates[name] for name in ("puzzle", *RIVALS) if name in job.candidates]
    if first := [choice for choice in dict.fromkeys(named) if choice not in known]:
        return first[:count]
    return propose(job.search, _evaluations(measured), count)


def _measure(
    job: _Job,
    parent: Parent,
    measurements: Sequence[Measurement],
    choices: Sequence[Choice],
    measured: Sequence[dict[str, Any]],
    batch_share: BatchShare,
    on_steps: OnSteps,
) -> list[dict[str, Any]]:
    """The damage of some assemblies, from the sums of all processes."""
    probes = [item.probe for item in measurements]
    states = embed(job.config, job.checkpoint, parent, probes)
    mine = run_assemblies(parent, states, measurements, [job.assembly(choice) for choice in choices], on_steps)
    batches = batch_share.gather([torch.stack(parts) for parts in zip(*mine, strict=True)])
    learnt = LearntDamage.of(job.search.library, _evaluations(measured))
    num_short, rows = len(job.probes.short), []
    for index, (choice, expected) in enumerate(zip(choices, learnt.expected(np.array(choices)), strict=True)):
        sums = [batch[index] for batch in batches]
        short, long = total_metrics(sums[:num_short]), total_metrics(sums[num_short:])
        rows.append(
            {
                "choice": list(choice),
                "sum": total(job.search.library.damages, choice),
                "expected": float(expected),
                "measured": short[job.config.metric] + job.config.long_weight * long[job.config.metric],
                "short": short,
                "long": long,
            }
        )
    return rows


def _refined(
    job: _Job, content: dict[str, Any], measured: Sequence[dict[str, Any]], best: dict[str, Any]
) -> dict[str, Any]:
    """The search's ``architecture.json``, with the best assembly in the place of its choice."""
    candidates = content["candidates"]
    if best["choice"] != list(job.candidates["puzzle"]):
        refined = describe(job.search.assembled(tuple(best["choice"]), "refined"))
        others = {UNREFINED if name == "puzzle" else name: candidate for name, candidate in candidates.items()}
        candidates = {"puzzle": refined} | others
    rows = _rows(job, measured)
    damages = {json.dumps(row["blocks"]): row["measured"] for row in rows}
    for name, candidate in candidates.items():
        known = damages.get(json.dumps(candidate["blocks"])) if candidate["keeps"] == "order" else None
        candidates = candidates | {name: candidate | {"measured": known}}
    return content | {"candidates": candidates, "refinement": {"metric": job.config.metric, "evaluations": rows}}


def _rows(job: _Job, measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured assemblies as people read them."""
    library = job.search.library
    return [
        {"blocks": [block.as_config() for block in library.architecture(tuple(row["choice"])).blocks]}
        | {name: row[name] for name in ("sum", "expected", "measured", "short", "long")}
        for row in measured
    ]


def _evaluations(measured: Sequence[dict[str, Any]]) -> list[Evaluation]:
    return [Evaluation(tuple(row["choice"]), row["measured"]) for row in measured]


def _file(scratch: Path) -> Path:
    return scratch / "evaluations.json"


def _saved(scratch: Path) -> list[dict[str, Any]]:
    """The assemblies that an earlier run has measured."""
    saved: list[dict[str, Any]] = json.loads(_file(scratch).read_text()) if _file(scratch).is_file() else []
    return saved

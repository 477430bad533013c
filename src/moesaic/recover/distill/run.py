"""Recover a child by global knowledge distillation from its parent, experts frozen; AutoModel trains it."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from moesaic.core.errors import ArtifactError
from moesaic.core.nodes import Nodes
from moesaic.core.process_group import num_processes
from moesaic.core.training_curve import read_curve
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.resolved_config import CONFIG
from moesaic.recover.distill.automodel.launch import check_installed, train
from moesaic.recover.distill.automodel.rows import Rows
from moesaic.recover.distill.automodel.settings import Job, expert_parallel_size
from moesaic.recover.distill.stage import DistillConfig, check_batch
from moesaic.recover.distill.trace_table import TraceTable
from moesaic.recover.generate_traces.traces import iterate_traces


def run(
    config: DistillConfig,
    *,
    child: Path,
    parent: Path,
    traces: Path,
    output: Path,
    scratch: Path,
    nodes: Nodes | None = None,
) -> dict[str, float]:
    """Write the trained child and ``training.jsonl``; a killed run goes on from its last checkpoint in ``scratch``.

    ``nodes`` are those of a cluster to train on; without them it is done here.
    """
    mine, whole = Checkpoint.open(child), Checkpoint.open(parent)
    _check_models(mine, whole)
    if nodes:
        mine = Checkpoint.open(nodes.visible("child", child, scratch))
        whole = Checkpoint.open(nodes.visible("parent", parent, scratch))
    job = _plan(mine, whole, scratch, nodes)
    check_batch(config, job.num_processes)
    counts = _check_traces(TraceTable.write(iterate_traces(traces), job.traces), config, whole)
    if config.steps and not job.trained.is_file():
        check_installed()
        train(config, job, nodes)
    job.curve.touch()
    trained = load_file(job.trained) if config.steps else {}
    rewrite_checkpoint(mine, output, trained, {"stage": "distill", "steps": config.steps}, extra=[job.curve])
    return counts | _metrics(job.curve)


def _plan(child: Checkpoint, parent: Checkpoint, scratch: Path, nodes: Nodes | None) -> Job:
    """On how many devices; experts are shared within a node only."""
    if nodes:
        on_gpus, count, here = nodes.gpus_per_node > 0, nodes.num_nodes, nodes.processes_per_node
    else:
        on_gpus, count, here = torch.cuda.is_available(), 1, num_processes()
    if on_gpus:
        child.shape.family.check_adapter("distill_on_gpus")
    shared = expert_parallel_size(here, parent.architecture, child.architecture) if on_gpus else 1
    return Job(
        child=child.directory.absolute(),
        parent=_as_child(parent, scratch / "parent") if on_gpus else parent.directory.absolute(),
        traces=(scratch / "traces").absolute(),
        scratch=scratch.absolute(),
        num_processes=count * here,
        on_gpus=on_gpus,
        driver_pid=None if nodes else os.getpid(),
        num_nodes=count,
        expert_parallel_size=shared,
        log_to_mlflow={"MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"} <= os.environ.keys(),
    )


def _as_child(parent: Checkpoint, directory: Path) -> Path:
    """The parent's own files under the config of a child that keeps every block: the cluster's class reads those."""
    directory.mkdir(exist_ok=True)
    for path in parent.directory.iterdir():
        if path.name != CONFIG and not (directory / path.name).exists():
            (directory / path.name).symlink_to(path.absolute())
    config = layout.child_config(parent.config, parent.architecture)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return directory.absolute()


def _check_models(child: Checkpoint, parent: Checkpoint) -> None:
    """States are compared layer by layer and tokens by their ids, so both must be laid out alike."""
    for what, mine, theirs in (
        ("layers", child.num_layers, parent.num_layers),
        ("hidden features", child.shape.hidden_size, parent.shape.hidden_size),
        ("vocabulary entries", child.shape.vocab_size, parent.shape.vocab_size),
    ):
        if mine != theirs:
            raise ArtifactError(
                f"{child.directory} has {mine} {what} and {parent.directory} {theirs}; give a child of this parent"
            )
    child.architecture.check_child_of(parent.architecture)


def _check_traces(table: TraceTable, config: DistillConfig, parent: Checkpoint) -> dict[str, float]:
    """Both kinds must be there and fit; returns how much there is."""
    if table.largest_token() >= parent.shape.vocab_size:
        raise ArtifactError(
            f"the traces have token {table.largest_token()}, the models only {parent.shape.vocab_size}; give traces of "
            "this parent"
        )
    kinds = {"training": False, "held_out": True}
    sizes = {name: len(table.chosen(config.efforts, held_out)) for name, held_out in kinds.items()}
    for effort in sorted(config.efforts):
        if not any(len(table.chosen((effort,), held_out)) for held_out in kinds.values()):
            raise ArtifactError(f"there are no traces at {effort} effort; generate them or leave it out of efforts")
    counts: dict[str, float] = {}
    for name, held_out in kinds.items():
        if not sizes[name]:
            raise ArtifactError(
                f"none of the {sum(sizes.values())} traces chosen is a {name.replace('_', '-')} one; both kinds are "
                f"needed, see held_out_share of generate_traces"
            )
        rows = Rows(table, config, held_out)
        counts |= {f"{name}_rows": float(len(rows)), f"{name}_traces_left_out": float(rows.num_left_out)}
    return counts


def _metrics(curve: Path) -> dict[str, float]:
    """The last step's and the last evaluation's figures, and what the first evaluation found before training."""
    rows = read_curve(curve)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "held_out_loss" in row]
    metrics = {name: value for row in (*steps[-1:], *evaluations[-1:]) for name, value in row.items()}
    before = {f"{name}_before": value for row in evaluations[:1] for name, value in row.items() if name != "step"}
    return {name: value for name, value in (metrics | before).items() if name != "step"}

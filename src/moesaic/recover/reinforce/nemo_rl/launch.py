"""Train one policy with NeMo-RL: write its inputs, run the driver, bring back the tensors that learned.

The driver is one command over files in one folder, which every node must see at the same path. It is a process beside
this one, or the same command as a RayJob on nodes of its own; NeMo-RL attaches to the Ray cluster that is there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.files import written_atomically
from moesaic.core.nodes import Nodes, Work
from moesaic.core.progress import say
from moesaic.core.training_curve import resume_curve
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Question, render_prompt
from moesaic.deploy.export_engine.bundle import write_vllm_plugin
from moesaic.deploy.export_engine.vllm import PLUGIN
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import check_lengths, read_stop_ids
from moesaic.recover.distill.automodel.expert_parallel import check_expert_parallel
from moesaic.recover.reinforce.nemo_rl.config import Placement, Run, render
from moesaic.recover.reinforce.nemo_rl.processor import prompt_row
from moesaic.recover.reinforce.nemo_rl.surface import CONVERTER, IMAGE
from moesaic.recover.reinforce.rewards import ReferenceTokens
from moesaic.recover.reinforce.stage import ReinforceConfig

CONFIG = "nemo_rl.yaml"
_LOG = "nemo_rl.log"
_CONVERTED = "converted"
_WEIGHTS = "pytorch_model.bin"


def train(
    config: ReinforceConfig,
    model: Path,
    questions: Sequence[Question],
    reference_tokens: ReferenceTokens,
    scratch: Path,
    nodes: Nodes | None = None,
) -> dict[str, Tensor]:
    """Train, or go on where a killed run left off, and return the weights that learned, by checkpoint name.

    Args:
        config: what to train.
        model: the checkpoint to begin with.
        questions: what is asked.
        reference_tokens: the parent's mean reply length by task and effort.
        scratch: where checkpoints and ``training.jsonl`` are kept.
        nodes: of a Ray cluster to train on; None: on this node's GPUs.

    Raises:
        ConfigError: if NeMo-RL is not installed, or cannot train this.
        StageError: if NeMo-RL fails; its log is this process's.
    """
    root = _nemo_rl_root()
    if nodes:
        model = nodes.visible("model", model, scratch)
        placement = Placement(nodes.num_nodes, nodes.gpus_per_node)
    else:
        placement = Placement(gpus_per_node=torch.cuda.device_count())
    run = plan(config, model, questions, scratch, placement)
    if run.first_step < config.steps:
        write = partial(_write, run, config, questions, reference_tokens, placement)
        _drive(run, write, nodes)
    if not (scratch / _CONVERTED).is_dir():
        _convert(root, run, config.steps)
    return collect(run, scratch / _CONVERTED / _WEIGHTS)


def prepare(
    config: ReinforceConfig,
    model: Path,
    questions: Sequence[Question],
    reference_tokens: ReferenceTokens,
    scratch: Path,
    placement: Placement,
) -> Run:
    """Write the prompts, the names of what learns and NeMo-RL's config into ``scratch``."""
    run = plan(config, model, questions, scratch, placement)
    _write(run, config, questions, reference_tokens, placement)
    return run


def plan(
    config: ReinforceConfig, model: Path, questions: Sequence[Question], scratch: Path, placement: Placement
) -> Run:
    """What a training reads and writes, checked; nothing is written yet.

    Raises:
        ConfigError: if it cannot be trained.
    """
    checkpoint = Checkpoint.open(model)
    checkpoint.shape.family.check_adapter("nemo_rl")
    check_expert_parallel(checkpoint.architecture, config.nemo_rl.expert_parallel)
    check_expert_parallel(checkpoint.architecture, config.nemo_rl.generation_expert_parallel)
    tokenizer = load_tokenizer(model)
    rendered = [render_prompt(problem, tokenizer, effort) for problem, effort in questions]
    check_lengths(rendered, config.max_new_tokens, checkpoint.shape.max_positions)
    run = Run(
        model=model.absolute(),
        prompts=scratch.absolute() / "prompts.jsonl",
        trainable=scratch.absolute() / "trainable.json",
        plugin=scratch.absolute() / PLUGIN,
        directory=scratch.absolute(),
        first_step=_last_step(scratch / "checkpoints"),
        num_prompts=len(questions),
        longest_prompt_tokens=max(map(len, rendered), default=0),
        stop_ids=tuple(sorted(read_stop_ids(model))),
        python_path=tuple(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
        log_to_mlflow=bool(os.environ.get("MLFLOW_RUN_ID") and os.environ.get("MLFLOW_TRACKING_URI")),
    )
    render(config, placement, run)
    return run


def _write(
    run: Run,
    config: ReinforceConfig,
    questions: Sequence[Question],
    reference_tokens: ReferenceTokens,
    placement: Placement,
) -> None:
    checkpoint = Checkpoint.open(run.model)
    rows = (prompt_row(problem, effort, reference_tokens[problem.task, effort]) for problem, effort in questions)
    run.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learns = layout.trainable_names(checkpoint.shape, checkpoint.architecture, config.trainable)
    run.trainable.write_text(json.dumps(learns))
    shutil.rmtree(run.plugin, ignore_errors=True)
    write_vllm_plugin(run.directory, checkpoint.shape.family)
    (run.directory / CONFIG).write_text(yaml.safe_dump(render(config, placement, run)))
    resume_curve(run.curve, run.first_step)


def _drive(run: Run, write: Callable[[], None], nodes: Nodes | None) -> None:
    """Run the driver here, or as a job, for which nothing is written while one of it still runs."""
    command = [sys.executable, "-m", "moesaic.recover.reinforce.nemo_rl.driver", str(run.directory / CONFIG)]
    if nodes:
        run_id = {name: value for name, value in os.environ.items() if name == "MLFLOW_RUN_ID"}
        nodes.run(Work(command, run_id, run.directory / _LOG), prepare=write, show=say)
    else:
        write()
        _call(command)


def collect(run: Run, weights: Path) -> dict[str, Tensor]:
    """The tensors that learned, from the converted checkpoint.

    Raises:
        StageError: if one of them is not in it.
    """
    tensors = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    names = json.loads(run.trainable.read_text())
    missing = [name for name in names if name not in tensors]
    if missing:
        raise StageError(f"{weights} lacks {missing[0]} ({len(missing)} such tensors); NeMo-RL names them otherwise")
    return {name: tensors[name] for name in names}


def _nemo_rl_root() -> Path:
    """The folder of NeMo-RL's source, which has its commands."""
    package = find_spec("nemo_rl")
    if package is None or package.origin is None:
        raise ConfigError(
            f"engine 'nemo_rl' needs NeMo-RL, which is not installed here; run the stage in an image built on {IMAGE}, "
            "or choose engine 'trl'"
        )
    return Path(package.origin).parents[1]


def _convert(root: Path, run: Run, step: int) -> None:
    """NeMo-RL's last checkpoint as a Hugging Face one; it appears under its name when it is whole."""
    checkpoint = run.checkpoints / f"step_{step}"
    if not checkpoint.is_dir():
        raise StageError(f"NeMo-RL ended without its last checkpoint {checkpoint}; its log says why")
    with written_atomically(run.directory / _CONVERTED) as partial:
        arguments = {
            "--config": checkpoint / "config.yaml",
            "--dcp-ckpt-path": checkpoint / "policy" / "weights",
            "--hf-ckpt-path": partial,
        }
        _call([sys.executable, str(root / CONVERTER), *(str(part) for pair in arguments.items() for part in pair)])


def _call(command: Sequence[str]) -> None:
    result = subprocess.run(command, check=False)
    if result.returncode:
        raise StageError(f"{' '.join(command)} failed with exit status {result.returncode}; its log is above")


def _last_step(checkpoints: Path) -> int:
    """The last whole checkpoint's step, 0 if there is none: NeMo-RL gives a folder its name when it is whole."""
    steps = [path.name.removeprefix("step_") for path in checkpoints.glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)

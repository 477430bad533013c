"""Train one policy with NeMo-RL: write its inputs, run the driver, bring back the tensors that learned.

The driver is one command over files in one folder, which every node must see at the same path. It is a process beside
this one, or the same command as a RayJob on nodes of its own; NeMo-RL attaches to the Ray cluster that is there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moesaic import gpt_oss
from moesaic.chat import load_tokenizer
from moesaic.checkpoint import Checkpoint
from moesaic.cluster.jobs import ClusterJob, Work
from moesaic.configs import ReinforceConfig
from moesaic.engines.automodel.expert_parallel import check_expert_parallel
from moesaic.engines.nemo_rl.config import Placement, Run, render
from moesaic.engines.nemo_rl.processor import prompt_row
from moesaic.engines.nemo_rl.surface import CONVERTER, IMAGE
from moesaic.errors import ConfigError, StageError
from moesaic.problems import Question, render_prompt

CONFIG = "nemo_rl.yaml"
_LOG = "nemo_rl.log"
_CONVERTED = "converted"
_WEIGHTS = "pytorch_model.bin"


def train(
    config: ReinforceConfig,
    model: Path,
    questions: Sequence[Question],
    reference_tokens: Mapping[str, float],
    scratch: Path,
    nodes: ClusterJob | None = None,
) -> dict[str, Tensor]:
    """Train, or go on where a killed run left off, and return the weights that learned, by checkpoint name.

    Args:
        config: what to train.
        model: the checkpoint to begin with.
        questions: what is asked.
        reference_tokens: the parent's mean reply length at each effort.
        scratch: where checkpoints and ``training.jsonl`` are kept.
        nodes: of a Ray cluster to train on; None: on this node's GPUs.

    Raises:
        ConfigError: if NeMo-RL is not installed, or cannot train this.
        StageError: if NeMo-RL fails; its log is this process's.
    """
    root = _nemo_rl_root()
    if nodes:
        model = nodes.visible("model", model, scratch)
        placement = Placement(nodes.place.num_nodes, nodes.place.gpus_per_node)
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
    reference_tokens: Mapping[str, float],
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
    check_expert_parallel(checkpoint.architecture, placement.expert_parallel_size)
    tokenizer = load_tokenizer(model)
    longest = max((len(render_prompt(problem, tokenizer, effort)) for problem, effort in questions), default=0)
    if longest + config.max_new_tokens > checkpoint.shape.max_positions:
        raise ConfigError(
            f"a prompt of {longest} tokens with a reply of up to {config.max_new_tokens} does not fit the model's "
            f"{checkpoint.shape.max_positions} positions; lower max_new_tokens or drop the long prompts"
        )
    run = Run(
        model=model.absolute(),
        prompts=scratch.absolute() / "prompts.jsonl",
        trainable=scratch.absolute() / "trainable.json",
        directory=scratch.absolute(),
        first_step=_last_step(scratch / "checkpoints"),
        num_prompts=len(questions),
        longest_prompt_tokens=longest,
        stop_ids=_stop_ids(model),
        log_to_mlflow=bool(os.environ.get("MLFLOW_RUN_ID") and os.environ.get("MLFLOW_TRACKING_URI")),
    )
    render(config, placement, run)
    return run


def _write(
    run: Run,
    config: ReinforceConfig,
    questions: Sequence[Question],
    reference_tokens: Mapping[str, float],
    placement: Placement,
) -> None:
    checkpoint = Checkpoint.open(run.model)
    rows = (prompt_row(problem, effort, reference_tokens[effort]) for problem, effort in questions)
    run.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learns = gpt_oss.trainable_names(checkpoint.shape, checkpoint.architecture, config.trainable)
    run.trainable.write_text(json.dumps(learns))
    (run.directory / CONFIG).write_text(yaml.safe_dump(render(config, placement, run)))
    _keep_curve_until(run.first_step, run.curve)


def _drive(run: Run, write: Callable[[], None], nodes: ClusterJob | None) -> None:
    """Run the driver here, or as a job, for which nothing is written while one of it still runs."""
    command = [sys.executable, "-m", "moesaic.engines.nemo_rl.driver", str(run.directory / CONFIG)]
    if nodes:
        run_id = {name: value for name, value in os.environ.items() if name == "MLFLOW_RUN_ID"}
        nodes.run(Work(command, run_id, run.directory / _LOG), prepare=write, show=_show)
    else:
        write()
        _call(command)


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def collect(run: Run, weights: Path) -> dict[str, Tensor]:
    """The tensors that learned, from the converted checkpoint.

    Raises:
        StageError: if one of them is not in it.
    """
    found = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    names = json.loads(run.trainable.read_text())
    missing = [name for name in names if name not in found]
    if missing:
        raise StageError(f"{weights} lacks {missing[0]} ({len(missing)} such tensors); NeMo-RL names them otherwise")
    return {name: found[name] for name in names}


def _nemo_rl_root() -> Path:
    """The folder of NeMo-RL's source, which has its commands."""
    found = find_spec("nemo_rl")
    if found is None or found.origin is None:
        raise ConfigError(
            f"engine 'nemo_rl' needs NeMo-RL, which is not installed here; run the stage in an image built on {IMAGE}, "
            "or choose engine 'trl'"
        )
    return Path(found.origin).parents[1]


def _convert(root: Path, run: Run, step: int) -> None:
    """NeMo-RL's last checkpoint as a Hugging Face one; it appears under its name when it is whole."""
    checkpoint = run.checkpoints / f"step_{step}"
    if not checkpoint.is_dir():
        raise StageError(f"NeMo-RL ended without its last checkpoint {checkpoint}; its log says why")
    partial = run.directory / f"{_CONVERTED}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    arguments = {
        "--config": checkpoint / "config.yaml",
        "--dcp-ckpt-path": checkpoint / "policy" / "weights",
        "--hf-ckpt-path": partial,
    }
    _call([sys.executable, str(root / CONVERTER), *(str(part) for pair in arguments.items() for part in pair)])
    partial.rename(run.directory / _CONVERTED)


def _call(command: Sequence[str]) -> None:
    result = subprocess.run(command, check=False)
    if result.returncode:
        raise StageError(f"{' '.join(command)} failed with exit status {result.returncode}; its log is above")


def _stop_ids(model: Path) -> tuple[int, ...]:
    """The tokens that end a reply, as ``moesaic.generation`` reads them."""
    for name in ("generation_config.json", "config.json"):
        path = model / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    raise ConfigError(f"{model} does not say which token ends a reply; set eos_token_id in its generation_config.json")


def _last_step(checkpoints: Path) -> int:
    """The last whole checkpoint's step, 0 if there is none: NeMo-RL gives a folder its name when it is whole."""
    steps = [path.name.removeprefix("step_") for path in checkpoints.glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def _keep_curve_until(step: int, curve: Path) -> None:
    """Drop the lines of steps that will be taken again."""
    lines = curve.read_text().splitlines(keepends=True) if curve.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    curve.write_text("".join(kept))

"""One block as one NeMo experiment. Importing this module imports NeMo, so only worker processes do.

A block is a ``ModelPT`` under ``exp_manager``, which resumes weights, optimiser and schedule from the last checkpoint;
the order of the data is ours and follows from the number of steps taken. Two faults of NeMo are worked around. Its
MLflow logger fails to start, so Lightning's is attached to the run that is already open. It refuses to resume where a
kill left several checkpoints or half of one, so only the newest whole one is kept.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger
from nemo.core.classes import ModelPT
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from moesaic.core.errors import StageError
from moesaic.core.live_log import LiveLog
from moesaic.models import layers, layout, loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.recover.distill_blocks.loss import batch_order, block_loss, error_and_energy
from moesaic.recover.distill_blocks.nemo.jobs import HELD_OUT, LEARNED, BlockExamples, BlockJob, BlockResult, Example

_LINE_EVERY_S = 5.0
_CURVE_POINTS = 100
_EPSILON = 1e-12
"""AdamW's: this loss is a small share of the residual stream's energy, so gradients can be below the usual 1e-8."""


class StepSampler(Sampler[int]):
    """The batches of all steps that are still to be taken when iteration begins."""

    def __init__(self, trainer: Trainer, num_batches: int, seed: int) -> None:
        self.trainer, self.num_batches, self.seed = trainer, num_batches, seed

    def __len__(self) -> int:
        return int(self.trainer.max_steps)

    def __iter__(self) -> Iterator[int]:
        return batch_order(self.num_batches, self.seed, range(self.trainer.global_step, self.trainer.max_steps))


class BlockModel(ModelPT):
    """One block of the child. Its checkpoints hold only what learns, and the losses so far."""

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        super().__init__(cfg, trainer)
        checkpoint = Checkpoint.open(Path(cfg.child))
        prefix = layout.layer_prefix(cfg.layer)
        self.block = loading.load_block(checkpoint, cfg.layer, getattr(torch, cfg.precision), loading.choose_device())
        for name in cfg.learned_names:
            parameter = self.block.get_parameter(name.removeprefix(prefix))
            parameter.data = checkpoint.tensor(name).to(parameter.device, torch.float32)
            parameter.requires_grad = True
        self.window = checkpoint.architecture.blocks[cfg.layer].window
        self.rotary = loading.rotary(checkpoint, cfg.num_positions)
        self.losses: list[float] = []
        self._printed = time.monotonic()

    @classmethod
    def list_available_models(cls) -> None:
        """None: NeMo has no trained model of this class to download."""

    def setup_training_data(self, train_data_config: DictConfig) -> None:
        """The batches to learn from, in the order of steps."""
        examples = BlockExamples(Path(train_data_config.states), self.cfg.layer, LEARNED)
        sampler = StepSampler(self.trainer, len(examples), train_data_config.seed)
        self._train_dl = DataLoader(examples, batch_size=None, sampler=sampler)

    def setup_validation_data(self, val_data_config: DictConfig) -> None:
        """Held-out sequences are measured before and after, not while the block learns."""

    def setup_optimizer_param_groups(self) -> None:
        """Give the optimiser only the parameters that learn."""
        self._optimizer_param_groups = [{"params": [tensor for tensor in self.parameters() if tensor.requires_grad]}]

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output; learned weights and the residual stream are float32 in any precision."""
        rotary = (self.rotary[0].to(hidden.device), self.rotary[1].to(hidden.device))
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.cfg.precision == "bfloat16"):
            return layers.run_block(self.block, hidden.float(), rotary, self.window)

    def training_step(self, batch: Example, batch_idx: int) -> Tensor:
        """The loss of one batch; a block that diverges ends the stage."""
        hidden, target, is_token = batch
        loss = block_loss(self(hidden), target, is_token)
        self.losses.append(loss.item())
        if not loss.isfinite():
            raise StageError(
                f"layer {self.cfg.layer}: the loss is {self.losses[-1]} at step {len(self.losses)}; "
                "choose a lower learning_rate"
            )
        self.log(f"layer_{self.cfg.layer:03d}/loss", loss.detach())
        return loss

    def on_train_batch_end(self, *details: Any) -> None:
        """Print progress every few seconds and at the last step."""
        super().on_train_batch_end(*details)
        done, total = self.trainer.global_step, self.trainer.max_steps
        if time.monotonic() - self._printed >= _LINE_EVERY_S or done == total:
            self._printed = time.monotonic()
            _print_progress(f"layer {self.cfg.layer}: step {done}/{total}, loss {self.losses[-1]:.3g}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out and add the losses."""
        checkpoint["state_dict"] = self.learned()
        checkpoint["losses"] = self.losses

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the frozen weights again and take the losses out."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        self.losses = checkpoint["losses"]

    def learned(self) -> dict[str, Tensor]:
        """What learns, by parameter name."""
        return {name: tensor.detach() for name, tensor in self.named_parameters() if tensor.requires_grad}


class MLflowRunLogger(Logger):
    """Logs metrics into the stage's own MLflow run. A server that fails does not stop the training."""

    name = version = "mlflow"

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        super().__init__()
        self._live, self._logger = LiveLog(), MLFlowLogger(run_id=run_id, tracking_uri=tracking_uri)

    def log_hyperparams(self, *details: Any, **more: Any) -> None:
        """Nothing: the stage has logged its config."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all metrics but Lightning's epoch, which has no meaning here."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        self._live.attempt(lambda: self._logger.log_metrics(values, step))


def train_block(job: BlockJob) -> None:
    """Train one block from its last checkpoint, if there is one, to the end, and save the result."""
    trainer = _make_trainer(job)
    held_out = BlockExamples(job.states, job.layer, HELD_OUT)
    longest = max(held_out.num_positions, BlockExamples(job.states, job.layer, LEARNED).num_positions)
    model = BlockModel(_model_config(job, longest), trainer)
    before = held_out_loss(model, held_out)
    trainer.fit(model)
    tensors = _round_learned(model.to(loading.choose_device()), Checkpoint.open(job.child))
    after = held_out_loss(model, held_out)
    for logger in trainer.loggers:
        for step, loss in ((0, before), (job.config.steps, after)):
            logger.log_metrics({f"layer_{job.layer:03d}/held_out_loss": loss}, step=step)
    _print_progress(f"layer {job.layer}: held-out loss {before:.4g} -> {after:.4g}")
    BlockResult(tuple(model.losses), before, after, tensors).save(job.directory)


@torch.no_grad()
def held_out_loss(model: BlockModel, examples: BlockExamples) -> float:
    """The loss over all held-out tokens together."""
    totals = torch.zeros(2, dtype=torch.float64)
    device = layers.device_of(model.block)
    for index in range(len(examples)):
        hidden, target, is_token = (tensor.to(device) for tensor in examples[index])
        totals += torch.stack(error_and_energy(model(hidden), target, is_token)).double().cpu()
    return float(totals[0] / totals[1])


def _make_trainer(job: BlockJob) -> Trainer:
    config = job.config
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=config.steps,
        max_epochs=-1,
        gradient_clip_val=config.optimizer.max_gradient_norm,
        log_every_n_steps=max(1, config.steps // _CURVE_POINTS),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    _keep_newest_checkpoint(job.directory / "checkpoints")
    exp_manager(trainer, OmegaConf.create(_experiment_config(job)))
    if (run := os.environ.get("MLFLOW_RUN_ID")) and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        trainer.loggers = [MLflowRunLogger(run_id=run, tracking_uri=uri)]
    return trainer


def _experiment_config(job: BlockJob) -> dict[str, Any]:
    return {
        "explicit_log_dir": str(job.directory),
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "create_tensorboard_logger": False,
        "create_preemption_callback": False,
        "log_step_timing": False,
        "checkpoint_callback_params": {
            "filename": "{step}",
            "monitor": "step",
            "every_n_train_steps": job.config.checkpoint_every_steps,
            "every_n_epochs": None,
            "save_top_k": 0,
            "save_last": True,
            "save_nemo_on_train_end": False,
        },
    }


def _model_config(job: BlockJob, num_positions: int) -> DictConfig:
    optimizer = job.config.optimizer
    schedule = {
        "name": "CosineAnnealing",
        "warmup_steps": optimizer.warmup_steps,
        "min_lr": optimizer.learning_rate * optimizer.final_learning_rate_ratio,
    }
    return OmegaConf.create(
        {
            "child": str(job.child),
            "layer": job.layer,
            "learned_names": list(job.learned_names),
            "num_positions": num_positions,
            "precision": job.config.precision,
            "train_ds": {"states": str(job.states), "seed": job.config.seed},
            "optim": {
                "name": "adamw",
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": _EPSILON,
                "weight_decay": optimizer.weight_decay,
                "sched": schedule,
            },
        }
    )


def _keep_newest_checkpoint(directory: Path) -> None:
    """NeMo marks a checkpoint that it is writing by a file beside it, and refuses to resume from more than one."""
    whole = []
    for path in directory.glob("*.ckpt"):
        if path.with_name(f"{path.stem}-unfinished").exists():
            path.unlink()
        else:
            whole.append(path)
    for path in sorted(whole, key=lambda path: path.stat().st_mtime)[:-1]:
        path.unlink()


def _round_learned(model: BlockModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Round what was learned as the checkpoint stores it, in the model too; by checkpoint name."""
    prefix = layout.layer_prefix(model.cfg.layer)
    tensors = {}
    for name in model.cfg.learned_names:
        parameter = model.block.get_parameter(name.removeprefix(prefix))
        tensors[name] = parameter.detach().to("cpu", checkpoint.tensor(name).dtype).contiguous()
        parameter.data = tensors[name].to(parameter)
    return tensors


def _print_progress(line: str) -> None:
    """Print a line of progress; ``sys.stdout`` is the log here."""
    print(line, file=sys.__stdout__, flush=True)

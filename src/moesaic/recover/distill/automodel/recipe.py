"""Our subclass of AutoModel's knowledge distillation recipe.

AutoModel's: process groups, sharding, optimiser, schedule, gradient accumulation and clipping, checkpoints and their
rotation. Ours: the loss (``moesaic.recover.distill.loss``), the rows and their order, what a checkpoint holds of the
model (the tensors that learn), evaluation, the training curve, here and in MLflow, and the end on divergence.

Gradients are of the weighted mean over all response tokens of a step: each rank's sum is divided by the weight of the
tokens on all ranks, and multiplied by the number of ranks because FSDP averages over them. Gradients are reduced after
every row, since a rank that waited for the step's last one would hold them whole.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.training.utils import scale_grads_and_clip_grad_norm
from nemo_automodel.recipes.llm import train_ft
from nemo_automodel.recipes.llm.kd import KnowledgeDistillationRecipeForNextTokenPrediction
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.core.child_processes import end_with
from moesaic.core.files import written_atomically
from moesaic.core.live_log import LiveLog
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.recover.distill.automodel.cluster_experts import limit_experts
from moesaic.recover.distill.automodel.cpu import CPU, device_policy
from moesaic.recover.distill.automodel.curve import Curve
from moesaic.recover.distill.automodel.messages import StepProgress, record_failure
from moesaic.recover.distill.automodel.rows import Rows, collate
from moesaic.recover.distill.automodel.settings import Job
from moesaic.recover.distill.automodel.states import compute_states, gather_trained, reshard
from moesaic.recover.distill.automodel.trained_weights import TrainedWeightsCheckpointer
from moesaic.recover.distill.loss import LossParts, distillation_loss, draw_compared
from moesaic.recover.distill.packing import IGNORED
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.distill.trace_table import TraceTable

_PARTS = ("kl", "hidden", "lm", "top1")


class DistillationRecipe(KnowledgeDistillationRecipeForNextTokenPrediction):
    """Trains the child's attention, norms and tables towards the parent's states on the parent's own replies."""

    checkpointer: Checkpointer

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        section = self.cfg.get("distillation").to_dict()
        self.settings = DistillConfig.model_validate(section["config"])
        self.job = Job.from_plain(section["job"])
        self.live = LiveLog()
        if self.job.on_gpus:
            from moesaic.recover.distill.automodel import cluster_model

            cluster_model.register()

    def setup(self) -> None:
        """Build everything and go back to the last checkpoint, if there is one."""
        if self.job.driver_pid is not None:
            end_with(self.job.driver_pid, os.getppid())
        with record_failure(self.job.failure), device_policy():
            super().setup()
            self.device = self.dist_env.device or CPU
            for model in (*self.model_parts, self.teacher_model):
                limit_experts(model, self.settings.expert_chunk_tokens)
            resumed = self.step_scheduler.step
            dist.barrier()
            self.curve = Curve(self.job.curve, self.settings.divergence_ratio, resumed, self.dist_env.is_main)
            self.held_out = Rows(TraceTable(self.job.traces), self.settings, held_out=True)

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Called by ``setup``: from here on checkpoints hold of the model only what learns."""
        ranks = {name: getattr(self.checkpointer, name) for name in ("dp_rank", "tp_rank", "pp_rank", "moe_mesh")}
        self.checkpointer = TrainedWeightsCheckpointer(self.checkpointer.config, **ranks)
        super().load_checkpoint(restore_from)

    def run_train_validation_loop(self) -> None:
        """Train, evaluate and save until the last step, then leave the trained tensors for the stage."""
        with record_failure(self.job.failure):
            self._train()
            if self.step_scheduler.step >= self.settings.steps:
                self._hand_over()
            self._finalize_and_close_checkpointer()

    def _train(self) -> None:
        progress = StepProgress(self.settings.steps, self.step_scheduler.step)
        if self.step_scheduler.step == 0:
            self._evaluate(0)
        for epoch in self.step_scheduler.epochs:
            for batches in self.step_scheduler:
                step = self.step_scheduler.step + 1
                values = self._run_train_optim_step(batches, self.settings.optimizer.max_gradient_norm)
                num_tokens = sum(batch["labels"].numel() for batch in batches) * self._get_dp_group_size()
                speed = progress.step(step, values["loss"], num_tokens, self.dist_env.is_main)
                self._log(step, {**values, "tokens_per_s": speed})
                self.curve.add(step, values)
                if step % self.settings.evaluate_every_steps == 0 or step == self.settings.steps:
                    self._evaluate(step)
                if self.step_scheduler.is_ckpt_step:
                    self.save_checkpoint(epoch, self.step_scheduler.step, values["loss"])

    def _run_train_optim_step(self, batches: Sequence[dict[str, Tensor]], max_grad_norm: float) -> dict[str, float]:
        """One optimiser step over this rank's batches; the loss and its parts are means over all response tokens."""
        weight = float(self._dp_allreduce(torch.stack([self._weights(batch).sum() for batch in batches]).sum()))
        num_ranks = self._get_dp_group_size(include_cp=True)
        sums = torch.zeros(len(_PARTS), device=self.device)
        for index, batch in enumerate(batches):
            parts = self._compare(batch, self.step_scheduler.step, self._get_dp_rank(), index)
            (parts.total(self.settings) * (num_ranks / weight)).backward()
            sums += _values(parts)
        gradient_norm = scale_grads_and_clip_grad_norm(
            max_grad_norm,
            self.model_parts,
            device_mesh=self.device_mesh,
            moe_mesh=self.moe_mesh,
            ep_axis_name="ep" if self.moe_mesh is not None else None,
            num_label_tokens=None,  # only pipeline parallelism reads it
            dp_group_size=num_ranks,
        )
        learning_rate = self.optimizer[0].param_groups[0]["lr"]
        for optimizer, schedule in zip(self.optimizer, self.lr_scheduler, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(1)
        means = self._means(sums, weight)
        return {**means, "gradient_norm": float(gradient_norm), "learning_rate": learning_rate}

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """The loss on held-out rows, dealt out to the ranks one by one; all run equally often, some on nothing.

        Ranks that share experts need equally many tokens at every moment, so that a last, smaller batch is none.
        """
        rank, num_ranks, num_rows = self._get_dp_rank(), self._get_dp_group_size(), len(self.held_out)
        sums = torch.zeros(len(_PARTS) + 1, device=self.device)
        for first in range(0, num_rows, num_ranks):
            row = min(first + rank, num_rows - 1)
            batch = collate([self.held_out[row]])
            found = torch.cat([_values(self._compare(batch, -1, row)), self._weights(batch).sum().view(1)])
            sums += found if first + rank < num_rows else 0 * found
        reshard(self.model_parts[0])
        weight = float(self._dp_allreduce(sums[-1:].clone()))
        values = {f"held_out_{name}": value for name, value in self._means(sums[:-1].clone(), weight).items()}
        self.curve.add(step, values)
        self._log(step, values)

    def _compare(self, batch: dict[str, Tensor], *draw: int) -> LossParts:
        """Child against parent on one batch, at its response tokens; ``draw`` numbers the sample of compared tokens."""
        rows = {name: batch[name].to(self.device) for name in ("input_ids", "position_ids", "responses")}
        compared = draw_compared(len(rows["responses"]), self.settings, *draw).to(self.device)
        with torch.no_grad():
            parent = compute_states(self.teacher_model, **rows, compared=compared)
        with self._precision():
            child = compute_states(self.model_parts[0], **rows, compared=compared)
        labels = batch["labels"].to(self.device).flatten()[rows["responses"]]
        weights = self._weights(batch).flatten()[rows["responses"]]
        return distillation_loss(child, parent, labels, self.settings, weights, compared)

    def _weights(self, batch: dict[str, Tensor]) -> Tensor:
        """How much each prediction counts, [batch, token]."""
        counted = batch["labels"] != IGNORED if self.settings.balance == "token" else batch["reply_share"]
        return counted.to(self.device, torch.float32)

    def _precision(self) -> AbstractContextManager[Any]:
        """What the child computes in: FSDP casts what it shards, autocast does where nothing is sharded."""
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model_parts[0].parameters())
        if sharded or self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.precision))

    def _means(self, sums: Tensor, weight: float) -> dict[str, float]:
        """Loss and parts per token, over all ranks."""
        means = (self._dp_allreduce(sums) / weight).tolist()
        parts = dict(zip(_PARTS, means, strict=True))
        weights = {"kl": self.settings.kl_weight, "hidden": self.settings.hidden_weight, "lm": self.settings.lm_weight}
        return {"loss": sum(weight * parts[name] for name, weight in weights.items()), **parts}

    def _log(self, step: int, values: dict[str, float]) -> None:
        """Into the MLflow run that the environment names; AutoModel's own way there fails where the server does."""
        if self.job.log_to_mlflow and self.dist_env.is_main:
            run_id = os.environ["MLFLOW_RUN_ID"]
            self.live.attempt(lambda: train_ft.mlflow.log_metrics(values, step=step, run_id=run_id))

    def _hand_over(self) -> None:
        """Write the trained tensors, whole and by their checkpoint names; the file appears when it is complete.

        No rank ends before: one that is gone may abort another that still talks to it.
        """
        child = Checkpoint.open(self.job.child)
        names = layout.trainable_names(child.shape, child.architecture, self.settings.trainable)
        tensors = gather_trained(self.model_parts[0], names)
        if self.dist_env.is_main:
            with written_atomically(self.job.trained) as partial:
                save_file(tensors, partial)
        dist.barrier()


def _values(parts: LossParts) -> Tensor:
    return torch.stack([getattr(parts, name).detach() for name in _PARTS])

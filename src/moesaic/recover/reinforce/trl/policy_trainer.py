"""TRL's GRPO trainer with our rollouts, packed forward passes and checkpoints of what learns alone.

Everything of GRPO itself is TRL's: groups, advantages, loss, accumulation, optimiser, resuming. Ours are

rollouts
    :mod:`moesaic.models.generation` replies to the prompts' own token ids, the very ones an evaluation uses. What is
    drawn depends on the seed and the step alone, so that a resumed run draws the same.
log-probabilities
    TRL pads every row of a step to its longest prompt plus its longest reply. Here rows go through the model end to
    end as one, positions restarting at 0, so that padding costs nothing.
loss
    Rows without an advantage are left out: they add nothing to the gradient (unless there is a KL penalty), and often
    half of the prompts are such, all of whose replies are right or wrong.
reference model
    Of the policy as it began, for the KL penalty; it shares the weights that do not learn.
checkpoints
    Only the weights that learn are written: all others are the input's.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from moesaic.models.generation import Sampling, generate
from moesaic.recover.reinforce.trl.curve import diverged

WEIGHTS = "trainable.safetensors"
"""The file in a checkpoint folder with the weights that learn."""
_SEED_STRIDE = 1_000_003
_NO_ADVANTAGE = 1e-3
"""Advantages are in standard deviations; what is below this is the rounding of a mean of equal rewards."""


class Rollouts:
    """Replies to the prompts of one step, as TRL's ``rollout_func``."""

    def __init__(self, sampling: Sampling, batch_size: int) -> None:
        self._sampling, self._batch_size = sampling, batch_size

    def __call__(self, prompts: list[list[int]], trainer: GRPOTrainer) -> dict[str, Any]:
        """Reply to each prompt, given as token ids; ``truncated`` goes on to the reward function."""
        seed = self._sampling.seed * _SEED_STRIDE + trainer.state.global_step
        try:
            replies = generate(trainer.model, prompts, replace(self._sampling, seed=seed), self._batch_size)
        except RuntimeError as failure:
            if "probability tensor" not in str(failure):
                raise
            raise diverged(trainer.state.global_step, "the model's logits are not finite") from failure
        return {
            "prompt_ids": prompts,
            "completion_ids": [list(reply.token_ids) for reply in replies],
            "logprobs": None,
            "truncated": [reply.truncated for reply in replies],
        }


class PolicyTrainer(GRPOTrainer):
    """Trains a policy by GRPO; the module says what differs from TRL."""

    def __init__(self, model: PreTrainedModel, kl_weight: float, **arguments: Any) -> None:
        """Arguments are TRL's, whose own KL weight must be 0: it would load the reference model from disk."""
        reference = _frozen_copy(model) if kl_weight else None
        super().__init__(model=model, **arguments)
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
            self.beta = kl_weight

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        if self.beta == 0:
            inputs = _keep_rows(inputs, inputs["advantages"].abs() > _NO_ADVANTAGE)
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"],
        logits_to_keep: int,
        *_: object,
        compute_entropy: bool = False,
        **__: object,
    ) -> tuple[Float[Tensor, "batch reply"], Float[Tensor, "batch reply"] | None, None]:
        is_token = attention_mask.bool()
        labels = input_ids.masked_fill(~is_token, -100)
        labels[:, :-logits_to_keep] = -100
        with self.accelerator.autocast():
            output = model(
                input_ids=input_ids[is_token].unsqueeze(0),
                position_ids=(attention_mask.cumsum(-1) - 1)[is_token].unsqueeze(0),
                labels=labels[is_token].unsqueeze(0),
                fused_lm_head=True,
            )
        log_probs = _unpack(output.log_probs, is_token)[:, -logits_to_keep:]
        return log_probs, _unpack(output.entropy, is_token)[:, -logits_to_keep:] if compute_entropy else None, None

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        learned = {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}
        save_file(learned, directory / WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in load_file(Path(resume_from_checkpoint) / WEIGHTS).items():
                parameters[name].copy_(weight)

    def create_model_card(self, *_: object, **__: object) -> None:
        """Write none: the stage's output has a record of its own."""

    def _send_telemetry(self) -> None:
        """Send nothing: no data of a training leaves its machine."""


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that never learns and shares the weights that do not learn either."""
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    copied: PreTrainedModel = copy.deepcopy(model, shared)
    return copied.requires_grad_(False).eval()


def _keep_rows(inputs: dict[str, Tensor], kept: Bool[Tensor, " batch"]) -> dict[str, Tensor]:
    """These rows of a batch, or the first one if there are none; figures of the whole batch stay as they are."""
    if not kept.any():
        kept = torch.arange(len(kept), device=kept.device) == 0
    return {name: value[kept] if value.dim() else value for name, value in inputs.items()}


def _unpack(values: Float[Tensor, "one packed"], is_token: Tensor) -> Float[Tensor, "batch token"]:
    """Spread the packed values over the rows; they begin at the second packed token, the first one is given."""
    first = values.new_zeros(1)
    return values.new_zeros(is_token.shape).masked_scatter(is_token, torch.cat([first, values[0]]))

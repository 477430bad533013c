"""Train one policy with TRL's GRPO on verifiable rewards, in this process and on one device.

GRPO (DeepSeekMath, arXiv 2402.03300) draws G replies to a prompt and moves the policy by the advantage of each::

    A_i = (r_i - mean_G r) / (std_G r + 1e-4),    or without scale_rewards A_i = r_i - mean_G r
    loss = - sum_i,t min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) / tokens + kl_weight * KL

with rho the ratio of a token's probability to that at which it was drawn; tokens counts those of all replies of the
step (that and the two bounds: DAPO, arXiv 2503.14476; advantages not scaled: Dr. GRPO, arXiv 2503.20783). A step draws
its replies and makes one update, so that rho is 1 and clipping does not act: the bounds matter to engines whose
rollouts lag behind. Truncated replies count, as 0.

Not supported: several processes or GPUs (replicas, sharded weights); a process that sees several GPUs is refused. The
engine for that is ``nemo_rl``.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig

from moesaic.core.errors import ConfigError
from moesaic.core.training_curve import CURVE
from moesaic.data.chat import decode_reply, load_tokenizer
from moesaic.data.problems import Question, render_prompt
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import Sampling, check_lengths, stop_ids
from moesaic.models.whole_model import load_model
from moesaic.recover.reinforce.rewards import ReferenceTokens, grade_reply
from moesaic.recover.reinforce.stage import ReinforceConfig, check_step
from moesaic.recover.reinforce.trl.curve import Curve, LiveCurve
from moesaic.recover.reinforce.trl.policy_trainer import WEIGHTS, PolicyTrainer, Rollouts


def train(
    config: ReinforceConfig,
    model: Path,
    questions: Sequence[Question],
    reference_tokens: ReferenceTokens,
    scratch: Path,
) -> dict[str, Tensor]:
    """Train, or go on where a killed run left off, and return the weights that learned, by checkpoint name.

    Args:
        config: what to train.
        model: the checkpoint to begin with.
        questions: what is asked.
        reference_tokens: the parent's mean reply length by task and effort.
        scratch: where checkpoints and ``training.jsonl`` are kept.
    """
    checkpoint = Checkpoint.open(model)
    tokenizer = load_tokenizer(model)
    rows = render_rows(questions, tokenizer)
    _check(config, rows, checkpoint.shape.max_positions)
    folder = scratch / "checkpoints"
    step = _last_step(folder)
    if step < config.steps:
        reward = reward_function(questions, tokenizer, reference_tokens, config)
        learner = _load(checkpoint, config)
        trainer = _trainer(config, learner, tokenizer, rows, reward, folder, Curve(scratch / CURVE, config.name, step))
        trainer.train(resume_from_checkpoint=str(_checkpoint(folder, step)) if step else None)
    learned: dict[str, Tensor] = load_file(_checkpoint(folder, config.steps) / WEIGHTS)
    return learned


def render_rows(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Every question: its prompt's token ids, as an evaluation renders them, and where it is from."""
    return [
        {"prompt": render_prompt(problem, tokenizer, effort), "question": index, "effort": effort}
        for index, (problem, effort) in enumerate(questions)
    ]


def row_order(num_rows: int, config: ReinforceConfig) -> list[int]:
    """The row asked at each place of the run: one shuffle of all rows after another, ``prompts_per_step`` a step."""
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    while len(order) < config.steps * config.prompts_per_step:
        order += torch.randperm(num_rows, generator=generator).tolist()
    return order[: config.steps * config.prompts_per_step]


def reward_function(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    reference_tokens: ReferenceTokens,
    config: ReinforceConfig,
) -> Callable[..., list[float]]:
    """TRL's reward function: takes the replies of a step and the columns of their rows, logs figures per effort."""

    def reward(
        completion_ids: list[list[int]],
        truncated: list[bool],
        question: list[int],
        effort: list[str],
        log_metric: Callable[[str, float], None],
        **_: object,
    ) -> list[float]:
        rewards = []
        for ids, is_cut, index, level in zip(completion_ids, truncated, question, effort, strict=True):
            text = decode_reply(ids, tokenizer)
            asked = questions[index][0]
            correct = asked.is_solved_by_reply(text, is_cut)
            reply = grade_reply(text, len(ids), is_cut, correct, reference_tokens[asked.task, level], config.rewards)
            for name, figure in reply.figures.items():
                log_metric(f"{name}_{level}", figure)
            rewards.append(reply.reward.total)
        return rewards

    return reward


def _check(config: ReinforceConfig, rows: Sequence[Mapping[str, Any]], max_positions: int) -> None:
    """Refuse before the first step what would fail in it or later."""
    check_step(config)
    check_lengths([row["prompt"] for row in rows], config.max_new_tokens, max_positions)
    if torch.cuda.device_count() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"engine trl trains in one process on one GPU, not on {torch.cuda.device_count()} GPUs with WORLD_SIZE "
            f"{os.environ.get('WORLD_SIZE', '1')}; set CUDA_VISIBLE_DEVICES to one of them, or choose engine nemo_rl"
        )


def _load(checkpoint: Checkpoint, config: ReinforceConfig) -> PreTrainedModel:
    """The policy: frozen weights in the precision of the config, those that learn in float32."""
    model = load_model(checkpoint.directory, getattr(torch, config.precision)).requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in layout.trainable_names(checkpoint.shape, checkpoint.architecture, config.trainable):
        parameters[name].data = parameters[name].data.float()
        parameters[name].requires_grad_(True)
    return model


def _trainer(
    config: ReinforceConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    reward: Callable[..., list[float]],
    folder: Path,
    curve: Curve,
) -> PolicyTrainer:
    sampling = Sampling(config.max_new_tokens, stop_ids(model), config.temperature, config.seed)
    with catch_warnings():
        filterwarnings("ignore", message="You are using 'rollout_func'")  # it may change: our pin of TRL is exact
        trainer = PolicyTrainer(
            model,
            config.kl_weight,
            reward_funcs=reward,
            args=_arguments(config, folder),
            train_dataset=Dataset.from_list(list(rows)).select(row_order(len(rows), config)),
            processing_class=tokenizer,
            rollout_func=Rollouts(sampling, config.batch_size),
            callbacks=[curve, *_mlflow()],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: ReinforceConfig, folder: Path) -> GRPOConfig:
    replies = config.prompts_per_step * config.generations_per_prompt
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.replies_per_forward,
        gradient_accumulation_steps=replies // config.replies_per_forward,
        num_generations=config.generations_per_prompt,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        loss_type="dapo",
        scale_rewards="group" if config.scale_rewards else "none",
        mask_truncated_completions=False,
        beta=0.0,
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        router_aux_loss_coef=0.0,
        shuffle_dataset=False,
        seed=config.seed,
        use_vllm=False,
        use_cpu=not on_gpu,
        bf16=config.precision == "bfloat16",
        gradient_checkpointing=on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_every_steps,
        save_total_limit=1,
        disable_tqdm=True,
        **_optimizer(config),
        report_to="none",
    )


def _optimizer(config: ReinforceConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    return {
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": optimizer.final_learning_rate_ratio},
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.max_gradient_norm,
    }


def _mlflow() -> list[LiveCurve]:
    """Log the curve into the run that the environment names; the config and the rest are logged by ``tracking``."""
    if not (os.environ.get("MLFLOW_RUN_ID") and os.environ.get("MLFLOW_TRACKING_URI")):
        return []
    os.environ.setdefault("MLFLOW_MAX_LOG_PARAMS", "0")
    return [LiveCurve()]


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def _last_step(folder: Path) -> int:
    """The last step whose checkpoint is whole, 0 if there is none: the trainer's state is written last."""
    return max(
        (int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/trainer_state.json")), default=0
    )

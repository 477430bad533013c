"""Our config of a policy as NeMo-RL's config of its GRPO, every value written out.

Choices that are NeMo-RL's own matter and ours alone [the papers say nothing of them]:

- Training is AutoModel's worker (DTensor v2) with our class of a child, spread by FSDP2 and expert parallelism.
- One optimiser step per batch of rollouts. vLLM's probabilities differ from the trainer's by rounding, and a router
  makes more of that; the loss weighs tokens by the ratio of the two, cut at 2.
- Rows of a step are batched by length and padded. NeMo-RL's packing goes through FlashAttention 2, which has no
  attention sinks, so it is off.
- vLLM begins with random weights and gets the trainer's, unpacked. So its config must not say that they are packed:
  NeMo-RL sees to that for the architecture ``GptOssForCausalLM`` alone. Our plugin, by which vLLM knows a child, is put
  on its workers' ``PYTHONPATH``.
- There is no validation inside: ``evaluate`` is a stage. Checkpoints are kept by age.
"""

import os
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from moesaic.core.errors import ConfigError
from moesaic.core.training_curve import CURVE
from moesaic.recover.reinforce.stage import NemoRlConfig, ReinforceConfig, check_placement
from moesaic.recover.training import OptimizerConfig

ENVIRONMENT = "moesaic"
"""What NeMo-RL calls our environment."""
PROCESSOR = "moesaic_prompt"
"""What NeMo-RL calls our data processor."""
TRAINABLE_VARIABLE = "MOESAIC_TRAINABLE"
"""Environment variable of policy workers: the file with the names of the tensors that learn."""

_LENGTH_ROUND = 64
_IMPORTANCE_CAP = 2.0
_ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class Placement:
    """Where a training runs; no part of what it computes, but for rounding."""

    num_nodes: int = 1
    gpus_per_node: int = 8

    @property
    def num_gpus(self) -> int:
        """Ranks of the training."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Run:
    """What a training reads and writes."""

    model: Path
    prompts: Path
    """Rows of ``processor.prompt_row``."""
    trainable: Path
    plugin: Path
    """The folder with vLLM's plugin."""
    directory: Path
    """Checkpoints, logs and the training curve go here."""
    first_step: int
    """Steps taken before: the last checkpoint's."""
    num_prompts: int
    longest_prompt_tokens: int
    stop_ids: tuple[int, ...]
    log_to_mlflow: bool
    python_path: tuple[str, ...] = ()
    """What ``PYTHONPATH`` has already."""

    @property
    def checkpoints(self) -> Path:
        """NeMo-RL writes ``step_N`` folders here, and resumes from the last."""
        return self.directory / "checkpoints"

    @property
    def curve(self) -> Path:
        """One line per step, of the rewards' parts."""
        return self.directory / CURVE


def render(config: ReinforceConfig, placement: Placement, run: Run) -> dict[str, Any]:
    """NeMo-RL's whole config.

    Raises:
        ConfigError: if the batch cannot be spread over the GPUs, or there are fewer prompts than a step needs.
    """
    _check_sizes(config, placement, run)
    return {
        "grpo": _grpo(config, run),
        "loss_fn": _loss(config),
        "policy": _policy(config, placement, run),
        "data": _data(run),
        "env": {ENVIRONMENT: _environment(config, run)},
        "checkpointing": _checkpointing(config, run),
        "logger": _logger(run),
        "cluster": {"num_nodes": placement.num_nodes, "gpus_per_node": placement.gpus_per_node},
    }


def _check_sizes(config: ReinforceConfig, placement: Placement, run: Run) -> None:
    check_placement(config, placement.num_gpus, on_job=placement.num_nodes > 1)
    for name in ("expert_parallel", "generation_tensor_parallel", "generation_expert_parallel"):
        size = getattr(config.nemo_rl, name)
        if placement.num_gpus % size:
            raise ConfigError(f"{name} {size} does not divide the {placement.num_gpus} GPUs; use a divisor")
    if run.num_prompts < config.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step is {config.prompts_per_step}, but there are {run.num_prompts} prompts; give more, or "
            "use fewer per step"
        )


def _grpo(config: ReinforceConfig, run: Run) -> dict[str, Any]:
    steps_per_epoch = run.num_prompts // config.prompts_per_step
    return {
        "num_prompts_per_step": config.prompts_per_step,
        "num_generations_per_prompt": config.generations_per_prompt,
        "max_num_steps": config.steps,
        "max_num_epochs": ceil(config.steps / steps_per_epoch) + 1,
        "max_rollout_turns": 1,
        "normalize_rewards": config.scale_rewards,
        "use_leave_one_out_baseline": False,
        "adv_estimator": {
            "name": "grpo",
            "normalize_rewards": config.scale_rewards,
            "use_leave_one_out_baseline": False,
        },
        "val_period": 0,
        "val_batch_size": None,
        "val_at_start": False,
        "val_at_end": False,
        "max_val_samples": None,
        "skip_reference_policy_logprobs_calculation": config.kl_weight == 0,
        "seed": config.seed,
        "overlong_filtering": False,
        "use_dynamic_sampling": False,
        "batch_multiplier": 1,
        "reward_shaping": {"enabled": False},
        "reward_scaling": {"enabled": False},
        "seq_logprob_error_threshold": None,
    }


def _loss(config: ReinforceConfig) -> dict[str, Any]:
    return {
        "ratio_clip_min": config.clip_low,
        "ratio_clip_max": config.clip_high,
        "ratio_clip_c": None,
        "reference_policy_kl_penalty": config.kl_weight,
        "reference_policy_kl_type": "k3",
        "kl_input_clamp_value": 20.0,
        "kl_output_clamp_value": 10.0,
        "use_kl_in_reward": False,
        "use_on_policy_kl_approximation": False,
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": _IMPORTANCE_CAP,
        "truncated_importance_sampling_ratio_min": None,
        "sequence_level_importance_ratios": False,
        "token_level_loss": True,
        "disable_ppo_ratio": False,
        "force_on_policy_ratio": False,
        "use_cispo": False,
        "positive_example_nll_weight": 0.0,
    }


def _policy(config: ReinforceConfig, placement: Placement, run: Run) -> dict[str, Any]:
    max_tokens = _max_tokens(config, run)
    rows = max(1, config.replies_per_forward // placement.num_gpus)
    sizes = {"train_mb_tokens": rows * max_tokens, "logprob_mb_tokens": rows * max_tokens}
    return {
        "model_name": str(run.model),
        "tokenizer": {"name": str(run.model), "chat_template_kwargs": None},
        "train_global_batch_size": config.prompts_per_step * config.generations_per_prompt,
        "train_micro_batch_size": rows,
        "logprob_batch_size": rows,
        "logprob_chunk_size": config.nemo_rl.logprob_chunk_tokens,
        "max_total_sequence_length": max_tokens,
        "make_sequence_length_divisible_by": 1,
        "precision": config.precision,
        "hf_config_overrides": {},
        "dtensor_cfg": _dtensor(config.nemo_rl, run),
        "megatron_cfg": {"enabled": False},
        "draft": {"enabled": False},
        "dynamic_batching": {"enabled": True, **sizes, "sequence_length_round": _LENGTH_ROUND},
        "sequence_packing": {"enabled": False},
        "max_grad_norm": config.optimizer.max_gradient_norm,
        "optimizer": _optimizer(config.optimizer),
        "scheduler": _scheduler(config.optimizer, config.steps),
        "generation": _generation(config, run),
    }


def _max_tokens(config: ReinforceConfig, run: Run) -> int:
    """One more than any row can have: NeMo-RL counts a row that fills the limit as truncated."""
    return run.longest_prompt_tokens + config.max_new_tokens + 1


def _dtensor(config: NemoRlConfig, run: Run) -> dict[str, Any]:
    return {
        "enabled": True,
        "_v2": True,
        "env_vars": {TRAINABLE_VARIABLE: str(run.trainable)},
        "tensor_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_parallel_size": config.expert_parallel,
        "sequence_parallel": False,
        "activation_checkpointing": config.activation_checkpointing,
        "cpu_offload": config.cpu_offload,
        "automodel_kwargs": {"force_hf": False, "use_liger_kernel": False},
    }


def _optimizer(optimizer: OptimizerConfig) -> dict[str, Any]:
    return {
        "name": "torch.optim.AdamW",
        "kwargs": {
            "lr": optimizer.learning_rate,
            "weight_decay": optimizer.weight_decay,
            "betas": list(optimizer.betas),
            "eps": _ADAM_EPSILON,
        },
    }


def _scheduler(optimizer: OptimizerConfig, steps: int) -> list[dict[str, Any]]:
    """A linear rise, then a cosine to the final learning rate; without warm-up the cosine alone."""
    warmup = optimizer.warmup_steps
    rise = {
        "name": "torch.optim.lr_scheduler.LinearLR",
        "kwargs": {"start_factor": 1 / max(1, warmup), "end_factor": 1.0, "total_iters": warmup},
    }
    cosine = {
        "name": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "kwargs": {
            "T_max": max(1, steps - warmup),
            "eta_min": optimizer.learning_rate * optimizer.final_learning_rate_ratio,
        },
    }
    return [rise, cosine, {"milestones": [warmup]}] if warmup else [cosine, {"milestones": []}]


def _generation(config: ReinforceConfig, run: Run) -> dict[str, Any]:
    sampling = {"temperature": config.temperature, "top_p": 1.0, "top_k": None}
    return {
        "backend": "vllm",
        "max_new_tokens": config.max_new_tokens,
        **sampling,
        **{f"val_{name}": value for name, value in sampling.items()},
        "stop_token_ids": list(run.stop_ids),
        "stop_strings": None,
        "vllm_cfg": {
            "async_engine": False,
            "precision": config.precision,
            "kv_cache_dtype": "auto",
            "tensor_parallel_size": config.nemo_rl.generation_tensor_parallel,
            "pipeline_parallel_size": 1,
            "expert_parallel_size": config.nemo_rl.generation_expert_parallel,
            "gpu_memory_utilization": config.nemo_rl.generation_memory,
            "max_model_len": _max_tokens(config, run),
            "enforce_eager": False,
            "env_vars": {"PYTHONPATH": os.pathsep.join([str(run.plugin), *run.python_path])},
        },
        "vllm_kwargs": {"hf_overrides": {"quantization_config": {}}},
        "colocated": {"enabled": True, "resources": {"gpus_per_node": None, "num_nodes": None}},
    }


def _data(run: Run) -> dict[str, Any]:
    return {
        "max_input_seq_length": run.longest_prompt_tokens,
        "shuffle": True,
        "num_workers": 0,
        "use_multiple_dataloader": False,
        "train": {
            "dataset_name": "ResponseDataset",
            "data_path": str(run.prompts),
            "processor": PROCESSOR,
            "env_name": ENVIRONMENT,
            "prompt_file": None,
            "system_prompt_file": None,
            "split_validation_size": 0,
        },
        "validation": None,
    }


def _environment(config: ReinforceConfig, run: Run) -> dict[str, Any]:
    return {
        "tokenizer": str(run.model),
        "stop_ids": list(run.stop_ids),
        "rewards": config.rewards.model_dump(mode="json"),
        "curve": str(run.curve),
        "first_step": run.first_step,
    }


def _checkpointing(config: ReinforceConfig, run: Run) -> dict[str, Any]:
    return {
        "enabled": True,
        "checkpoint_dir": str(run.checkpoints),
        "metric_name": None,
        "higher_is_better": True,
        "keep_top_k": 1,
        "save_period": config.checkpoint_every_steps,
        "checkpoint_must_save_by": None,
        "model_save_format": "torch_save",
        "save_consolidated": False,
        "save_optimizer": True,
    }


def _logger(run: Run) -> dict[str, Any]:
    return {
        "log_dir": str(run.directory / "logs"),
        "num_val_samples_to_print": 0,
        "wandb_enabled": False,
        "swanlab_enabled": False,
        "tensorboard_enabled": False,
        "mlflow_enabled": run.log_to_mlflow,
        "monitor_gpus": False,
        "wandb": {},
        "mlflow": {},
        "gpu_monitoring": {"collection_interval": 10, "flush_interval": 10},
    }

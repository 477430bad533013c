"""AutoModel's YAML, rendered from our config: what to train, on what rows, how far, and on which devices.

On CPUs the models are transformers' classes and every rank holds them whole or, with several ranks, a shard of them
(FSDP2 over gloo). On GPUs they are the class of ``cluster_model``, sharded by FSDP2 and, where the expert counts of
parent and child allow it, expert parallel; a parent is read as a child whose blocks are all its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import gcd
from pathlib import Path
from typing import Any

from moesaic.core.training_curve import CURVE
from moesaic.models.architecture import Architecture
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.training import OptimizerConfig

_PACKAGE = "moesaic.recover.distill.automodel"
_PATIENCE_MINUTES = 60
"""How long a rank waits for another; the slowest thing between two collectives is reading a checkpoint."""


@dataclass(frozen=True)
class Job:
    """Where a distillation runs: files and devices, which are no part of its config."""

    child: Path
    parent: Path
    traces: Path
    """The directory of their table."""
    scratch: Path
    """Checkpoints, the training curve and the trained tensors go there."""
    num_processes: int
    on_gpus: bool
    """One process per GPU; else all of them on CPUs."""
    driver_pid: int | None
    """The training ends when this process does; None: when its job does."""
    num_nodes: int = 1
    """Nodes with an equal share of the processes each."""
    expert_parallel_size: int = 1
    """GPUs that share the experts of a layer."""
    log_to_mlflow: bool = False
    """Into the run that MLFLOW_RUN_ID names."""

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Job":
        """Make a job of the values that ``to_plain`` returns."""
        paths = {field.name: Path(values[field.name]) for field in fields(cls) if field.type is Path}
        return cls(**{**values, **paths})

    def to_plain(self) -> dict[str, Any]:
        """The fields as text, numbers and booleans, for YAML."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @property
    def log(self) -> Path:
        """Everything the engine prints."""
        return self.scratch / "engine.log"

    @property
    def settings(self) -> Path:
        """The rendered YAML."""
        return self.scratch / "kd.yaml"

    @property
    def curve(self) -> Path:
        """One line per step and evaluation so far."""
        return self.scratch / CURVE

    @property
    def failure(self) -> Path:
        """What went wrong, in one line, if something did."""
        return self.scratch / "failure.txt"

    @property
    def trained(self) -> Path:
        """The trained tensors; there only when training has come to its end."""
        return self.scratch / "trained.safetensors"


def expert_parallel_size(num_gpus: int, parent: Architecture, child: Architecture) -> int:
    """The most GPUs, a divisor of ``num_gpus``, that can share the experts of every layer of both models evenly."""
    return gcd(num_gpus, *(block.num_experts for model in (parent, child) for block in model.blocks))


def render(config: DistillConfig, job: Job) -> dict[str, Any]:
    """The content of ``kd.yaml``; paths are absolute, numbers are the config's."""
    settings: dict[str, Any] = {
        "recipe": f"{_PACKAGE}.recipe.DistillationRecipe",
        "seed": config.seed,
        "dist_env": {"backend": "nccl" if job.on_gpus else "gloo", "timeout_minutes": _PATIENCE_MINUTES},
        "distributed": _distribution(config, job),
        "model": _model(job.child, "child", config, job),
        "teacher_model": _model(job.parent, "parent", config, job),
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},  # set up, never called
        "optimizer": _optimizer(config.optimizer),
        "lr_scheduler": _schedule(config.optimizer, config.steps),
        "clip_grad_norm": {"max_norm": config.optimizer.max_gradient_norm},
        "step_scheduler": {
            "global_batch_size": config.rows_per_step,
            "local_batch_size": config.rows_per_forward,
            "max_steps": config.steps,
            "num_epochs": 1,
            "ckpt_every_steps": config.checkpoint_every_steps,
            "save_checkpoint_every_epoch": False,
        },
        "checkpoint": {
            "enabled": True,
            # They fit one number of ranks only; with another one, training begins anew.
            "checkpoint_dir": str(job.scratch / f"checkpoints-of-{job.num_processes}"),
            "restore_from": "LATEST",
            "save_consolidated": False,
            "max_recent_checkpoints": 2,
        },
        "dataset": {
            "_target_": f"{_PACKAGE}.rows.TrainingRows",
            "traces": str(job.traces),
            "config": config.model_dump(mode="json"),
        },
        "dataloader": {"collate_fn": f"{_PACKAGE}.rows.collate", "shuffle": False},
        "distillation": {"config": config.model_dump(mode="json"), "job": job.to_plain()},
    }
    if job.on_gpus:
        settings["freeze_config"] = _frozen_modules(config)
    return settings


def _distribution(config: DistillConfig, job: Job) -> dict[str, Any]:
    return {
        "strategy": "fsdp2",
        "ep_size": job.expert_parallel_size,
        "activation_checkpointing": job.on_gpus and config.activation_checkpointing,
        "reshard_after_forward": True,  # AutoModel keeps a model gathered where experts are shared, unless told
        "mp_policy": {
            "_target_": "torch.distributed.fsdp.MixedPrecisionPolicy",
            "param_dtype": config.precision,
            "reduce_dtype": "float32",
            "cast_forward_inputs": False,
        },
    }


def _model(directory: Path, role: str, config: DistillConfig, job: Job) -> dict[str, Any]:
    if not job.on_gpus:
        loader: dict[str, Any] = {"_target_": f"{_PACKAGE}.models.load_{role}", "precision": config.precision}
        if role == "child":
            loader |= {"trainable": list(config.trainable)}
        return loader | {"pretrained_model_name_or_path": str(directory), "trust_remote_code": False}
    return {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": str(directory),
        "trust_remote_code": False,
        "force_hf": False,
        "torch_dtype": "float32" if role == "child" else config.precision,
        "backend": {
            "_target_": "nemo_automodel.components.models.common.BackendConfig",
            "attn": "flex",
            "linear": "torch",
            "rms_norm": "torch_fp32",
            "dispatcher": "torch",
            "experts": "torch_mm",
            "rope_fusion": False,
        },
    }


def _frozen_modules(config: DistillConfig) -> dict[str, Any]:
    """AutoModel's words for what does not learn; ``gate`` is its name of the router."""
    modules = {
        "attention": ["*.self_attn"],
        "norms": ["*layernorm", "model.norm"],
        "router": ["*.mlp.gate"],
        "embedding": ["model.embed_tokens"],
        "head": ["lm_head"],
    }
    frozen = ["*.mlp.experts", *(glob for word in modules if word not in config.trainable for glob in modules[word])]
    return {"freeze_modules": [{"glob": glob} for glob in frozen]}


def _optimizer(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "_target_": "torch.optim.AdamW",
        "lr": config.learning_rate,
        "betas": list(config.betas),
        "weight_decay": config.weight_decay,
    }


def _schedule(config: OptimizerConfig, steps: int) -> dict[str, Any]:
    """Step k of the warm-up's w learns at k / (w + 1) of the highest rate, the run's last step at the final one."""
    warmup = max(0, min(config.warmup_steps, steps - 2))
    return {
        "lr_decay_style": "cosine",
        "lr_warmup_steps": warmup,
        "lr_decay_steps": max(1, steps - 1),
        "init_lr": config.learning_rate / (warmup + 1),
        "max_lr": config.learning_rate,
        "min_lr": config.learning_rate * config.final_learning_rate_ratio,
    }

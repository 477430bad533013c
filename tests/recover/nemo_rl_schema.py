"""What NeMo-RL's GRPO takes: its typed dicts, strictly, for the parts that we render.

Read in its source, and held against what our configuration renders. NeMo-RL itself ignores keys it
does not know and fails late on some it lacks. Here an unknown key, a missing one and a value of the wrong type fail. A
key is required where NeMo-RL reads it without a fallback, even if its own type says otherwise, and wherever its default
is a choice that ours must not depend on. Sections that we never switch on have the one key that switches them off.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Section(BaseModel):
    """A part of NeMo-RL's config: exactly these keys, exactly these types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Disabled(Section):
    """``...Disabled`` in nemo_rl/models/policy/__init__.py."""

    enabled: Literal[False]


class RewardShaping(Disabled):
    """``RewardShapingConfig`` in nemo_rl/algorithms/reward_functions.py; rewards are shaped by our rewards."""


class AdvantageEstimator(Section):
    """``AdvEstimatorConfig`` in nemo_rl/algorithms/grpo.py."""

    name: Literal["grpo"]
    normalize_rewards: bool
    use_leave_one_out_baseline: bool


class Grpo(Section):
    """``GRPOConfig`` in nemo_rl/algorithms/grpo.py."""

    num_prompts_per_step: int
    num_generations_per_prompt: int
    max_num_epochs: int
    max_num_steps: int
    max_rollout_turns: int
    normalize_rewards: bool
    use_leave_one_out_baseline: bool
    val_period: int
    val_batch_size: int | None
    val_at_start: bool
    val_at_end: bool
    max_val_samples: int | None
    skip_reference_policy_logprobs_calculation: bool
    seed: int
    overlong_filtering: bool
    use_dynamic_sampling: bool
    batch_multiplier: int
    reward_shaping: RewardShaping
    reward_scaling: Disabled
    seq_logprob_error_threshold: float | None
    adv_estimator: AdvantageEstimator


class Loss(Section):
    """``ClippedPGLossConfig`` in nemo_rl/algorithms/loss/loss_functions.py."""

    disable_ppo_ratio: bool
    token_level_loss: bool
    sequence_level_importance_ratios: bool
    ratio_clip_min: float
    ratio_clip_max: float
    ratio_clip_c: float | None
    reference_policy_kl_penalty: float
    reference_policy_kl_type: Literal["k1", "k2", "k3"]
    kl_input_clamp_value: float | None
    kl_output_clamp_value: float | None
    use_kl_in_reward: bool
    use_importance_sampling_correction: bool
    truncated_importance_sampling_type: Literal["tis", "icepop", "seq-mask-tis"] | None
    truncated_importance_sampling_ratio: float | None
    truncated_importance_sampling_ratio_min: float | None
    use_on_policy_kl_approximation: bool
    force_on_policy_ratio: bool
    use_cispo: bool
    positive_example_nll_weight: float


class Tokenizer(Section):
    """``TokenizerConfig`` in nemo_rl/models/policy/__init__.py."""

    name: str
    chat_template_kwargs: dict[str, Any] | None


class AutomodelArguments(Section):
    """``AutomodelKwargs`` in nemo_rl/models/policy/__init__.py."""

    force_hf: bool
    use_liger_kernel: bool


class DTensor(Section):
    """``DTensorConfig`` in nemo_rl/models/policy/__init__.py; ``_v2`` is AutoModel's worker."""

    enabled: Literal[True]
    v2: Literal[True] = Field(alias="_v2")
    env_vars: dict[str, str]
    tensor_parallel_size: Literal[1]
    context_parallel_size: Literal[1]
    expert_parallel_size: int
    sequence_parallel: bool
    activation_checkpointing: bool
    cpu_offload: bool
    automodel_kwargs: AutomodelArguments


class DynamicBatching(Section):
    """``DynamicBatchingConfig`` in nemo_rl/models/policy/__init__.py."""

    enabled: Literal[True]
    train_mb_tokens: int
    logprob_mb_tokens: int
    sequence_length_round: int


class SequencePacking(Section):
    """``SequencePackingConfig`` in nemo_rl/models/policy/__init__.py."""

    enabled: Literal[True]
    train_mb_tokens: int
    logprob_mb_tokens: int
    algorithm: str


class Optimizer(Section):
    """``PytorchOptimizerConfig`` in nemo_rl/models/policy/__init__.py, with AdamW's arguments."""

    class AdamW(Section):
        """Arguments of ``torch.optim.AdamW``."""

        lr: float
        weight_decay: float
        betas: list[float]
        eps: float

    name: Literal["torch.optim.AdamW"]
    kwargs: AdamW


class Scheduler(Section):
    """``SinglePytorchSchedulerConfig`` in nemo_rl/models/policy/__init__.py."""

    name: str
    kwargs: dict[str, float | int]


class Milestones(Section):
    """``SinglePytorchMilestonesConfig`` in nemo_rl/models/policy/__init__.py."""

    milestones: list[int]


class Vllm(Section):
    """``VllmSpecificArgs`` in nemo_rl/models/generation/vllm/config.py."""

    async_engine: bool
    precision: str
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel_size: int
    gpu_memory_utilization: float
    max_model_len: int
    enforce_eager: bool


class Colocation(Section):
    """``ColocationConfig`` in nemo_rl/models/generation/interfaces.py."""

    class Resources(Section):
        """``OptionalResourcesConfig``, read only where generation has GPUs of its own."""

        gpus_per_node: int | None
        num_nodes: int | None

    enabled: Literal[True]
    resources: Resources


class Generation(Section):
    """``VllmConfig`` in nemo_rl/models/generation/vllm/config.py, over ``GenerationConfig`` in interfaces.py beside."""

    backend: Literal["vllm"]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stop_token_ids: list[int]
    stop_strings: list[str] | None
    vllm_cfg: Vllm
    vllm_kwargs: dict[str, Any]
    colocated: Colocation


class Policy(Section):
    """``PolicyConfig`` in nemo_rl/models/policy/__init__.py."""

    model_name: str
    tokenizer: Tokenizer
    train_global_batch_size: int
    train_micro_batch_size: int
    logprob_batch_size: int
    logprob_chunk_size: int | None
    max_total_sequence_length: int
    make_sequence_length_divisible_by: int
    precision: Literal["float32", "bfloat16"]
    hf_config_overrides: dict[str, Any]
    dtensor_cfg: DTensor
    megatron_cfg: Disabled
    draft: Disabled
    dynamic_batching: DynamicBatching | Disabled
    sequence_packing: SequencePacking | Disabled
    max_grad_norm: float
    optimizer: Optimizer
    scheduler: list[Scheduler | Milestones]
    generation: Generation


class ResponseDataset(Section):
    """``ResponseDatasetConfig`` in nemo_rl/data/__init__.py."""

    dataset_name: Literal["ResponseDataset"]
    data_path: str
    processor: str
    env_name: str
    prompt_file: None
    system_prompt_file: None
    split_validation_size: Literal[0]


class Data(Section):
    """``DataConfig`` in nemo_rl/data/__init__.py."""

    max_input_seq_length: int
    shuffle: bool
    num_workers: int
    use_multiple_dataloader: Literal[False]
    train: ResponseDataset
    validation: None


class Checkpointing(Section):
    """``CheckpointingConfig`` in nemo_rl/utils/checkpoint.py."""

    enabled: Literal[True]
    checkpoint_dir: str
    metric_name: str | None
    higher_is_better: bool
    keep_top_k: int
    save_period: int
    checkpoint_must_save_by: str | None
    model_save_format: Literal["torch_save", "safetensors"]
    save_consolidated: bool
    save_optimizer: bool


class GpuMonitoring(Section):
    """``GPUMonitoringConfig`` in nemo_rl/utils/logger.py."""

    collection_interval: int | float
    flush_interval: int | float


class Empty(Section):
    """A backend's settings, all left to the environment or never read."""


class Logger(Section):
    """``GRPOLoggerConfig`` in nemo_rl/algorithms/grpo.py, over ``LoggerConfig`` in nemo_rl/utils/logger.py.

    Without ``run_id`` and ``tracking_uri`` its MLflow logger takes MLFLOW_RUN_ID and MLFLOW_TRACKING_URI.
    """

    log_dir: str
    num_val_samples_to_print: int
    wandb_enabled: Literal[False]
    swanlab_enabled: Literal[False]
    tensorboard_enabled: Literal[False]
    mlflow_enabled: bool
    monitor_gpus: bool
    wandb: Empty
    mlflow: Empty
    gpu_monitoring: GpuMonitoring


class Cluster(Section):
    """``ClusterConfig`` in nemo_rl/distributed/virtual_cluster.py."""

    gpus_per_node: int
    num_nodes: int


class MasterConfig(Section):
    """``MasterConfig`` in nemo_rl/algorithms/grpo.py; what is in ``env`` is each environment's own."""

    grpo: Grpo
    loss_fn: Loss
    policy: Policy
    data: Data
    env: dict[str, dict[str, Any]]
    checkpointing: Checkpointing
    logger: Logger
    cluster: Cluster


def check(config: dict[str, Any]) -> None:
    """NeMo-RL must know every key of a config and find every one it needs.

    Raises:
        AssertionError: with every key that is unknown, missing or of the wrong type.
    """
    try:
        MasterConfig.model_validate(config)
    except ValidationError as invalid:
        problems = [f"  {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in invalid.errors()]
        raise AssertionError("NeMo-RL would not take this config:\n" + "\n".join(problems)) from invalid

"""GRPO on TRL, or on NeMo-RL with `engine: nemo_rl`.

Rewards: verified answer, format, length against the parent's mean at the same effort.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moesaic.core.config import Amount, Config, Efforts, Positive, Precision
from moesaic.core.errors import ConfigError
from moesaic.core.stage import Stage, dataset, model
from moesaic.recover.training import OptimizerConfig, Trainable


class RewardConfig(Config):
    """What a reply earns, see ``rewards.py``."""

    correct: Annotated[float, Field(gt=0)] = 1.0
    """For an answer that its verifier accepts."""
    format: Annotated[float, Field(ge=0)] = 0.0
    """For a reply that ends its reasoning and gives a final answer, right or wrong."""
    length: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of ``correct`` that an endlessly long right reply loses; at twice the parent's mean length it is half."""

    @model_validator(mode="after")
    def _right_is_worth_more(self) -> Self:
        least = self.correct * (1 - self.length)
        if self.format > least:
            raise ValueError(
                f"format {self.format} is more than correct * (1 - length) = {least:g}: a wrong reply could earn more "
                "than a right one; lower format or length"
            )
        return self


class NemoRlConfig(Config):
    """How NeMo-RL shares a policy out over the GPUs that it is given."""

    expert_parallel: Positive = 1
    """GPUs that share a layer's experts in training; it divides every layer's number of them."""
    generation_tensor_parallel: Positive = 1
    """GPUs of one vLLM: it holds the policy in bfloat16, experts unpacked, beside the sleeping trainer."""
    generation_expert_parallel: Positive = 1
    """GPUs that share a layer's experts in vLLM: 1, or a multiple of its tensor parallelism."""
    generation_memory: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of a GPU that vLLM may take while it generates."""
    logprob_chunk_tokens: Positive = 1024
    """Tokens whose probabilities are computed at once in float32; their logits are held whole in bfloat16."""
    activation_checkpointing: bool = True
    """A layer keeps its input only and is computed again for its gradient."""
    cpu_offload: bool = False
    """Weights and optimizer wait in the hosts' memory."""

    @model_validator(mode="after")
    def _vllm_shares_experts_evenly(self) -> Self:
        experts, tensors = self.generation_expert_parallel, self.generation_tensor_parallel
        if experts > 1 and experts % tensors:
            raise ValueError(
                f"generation_expert_parallel {experts} must be 1 or a multiple of generation_tensor_parallel {tensors}"
            )
        return self


class ReinforceConfig(Config):
    """One policy trained by GRPO on verifiable rewards, experts and router frozen (paper A trains two)."""

    name: str = "high"
    """What the report calls the policy."""
    engine: Literal["trl", "nemo_rl"] = "trl"
    """TRL on CPU or a few GPUs; NeMo-RL on a cluster."""
    efforts: Efforts = ("high",)
    """Efforts every prompt is rendered at; one that is named twice counts twice."""
    min_parent_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out a task at an effort at which the parent solves less than this share of it: there a right answer is
    mostly a guess, and its reward noise."""
    max_parent_accuracy: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Leave out a task at an effort at which the parent solves more than this share: there is little to win."""
    rewards: RewardConfig = RewardConfig()
    """What a reply earns."""
    max_prompts: Positive | None = None
    """Prompts to use, spread evenly over the tasks. None: all."""
    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimiser steps. 0 hands the child on as it is."""
    prompts_per_step: Positive = 32
    """Different prompts of one step."""
    generations_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Replies to each prompt; their mean reward is the baseline."""
    replies_per_forward: Positive = 32
    """Replies that go through the model at once when it learns; the rest is gradient accumulation."""
    batch_size: Positive = 256
    """Replies generated together."""
    max_new_tokens: Positive = 512
    """Generation stops here; a truncated reply earns nothing."""
    temperature: Amount = 1.0
    """Of the rollouts."""
    clip_low: Amount = 0.2
    """The probability ratio is clipped below at 1 - clip_low; acts where one rollout serves several steps."""
    clip_high: Amount = 0.28
    """The probability ratio is clipped above at 1 + clip_high; acts where one rollout serves several steps."""
    scale_rewards: bool = True
    """Divide a prompt's advantages by the standard deviation of its rewards, as in GRPO. Better not where length has a
    price: of replies that are all right only the price differs, and divided so it weighs as much as an answer."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the KL divergence from the checkpoint that training began with."""
    trainable: tuple[Trainable, ...] = ("attention", "norms", "embedding", "head")
    """What learns. Experts never do; without ``router`` neither does it."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """How weights move."""
    checkpoint_every_steps: Positive = 20
    """A killed run resumes from the last of these."""
    seed: int = 0
    """For the order of prompts and the rollouts."""
    precision: Precision = "bfloat16"
    """What the model computes in."""
    nemo_rl: NemoRlConfig = NemoRlConfig()
    """How NeMo-RL shares the policy out; the other engine does not read it."""


def check_step(config: ReinforceConfig) -> None:
    """Raise ConfigError if TRL cannot learn from the replies of a step in equal parts."""
    replies = config.prompts_per_step * config.generations_per_prompt
    if config.engine == "trl" and replies % config.replies_per_forward:
        raise ConfigError(
            f"replies_per_forward = {config.replies_per_forward} does not divide the {replies} replies of a step "
            "(prompts_per_step * generations_per_prompt)"
        )


def check_placement(config: ReinforceConfig, num_gpus: int, on_job: bool) -> None:
    """The engine must be able to train where it is put, and a step's replies be the same number on every GPU.

    Args:
        config: of the policy.
        num_gpus: of all nodes together.
        on_job: whether these are the nodes of a job.

    Raises:
        ConfigError: saying what would fit.
    """
    if not config.steps:
        return
    if config.engine == "trl":
        if on_job:
            raise ConfigError(
                "engine 'trl' trains in one process, but the cluster profile gives reinforce a job's nodes; choose "
                "engine 'nemo_rl', or leave reinforce out of the profile's jobs"
            )
        return
    if num_gpus < 1:
        raise ConfigError("NeMo-RL trains on GPUs, and there is none here; run the stage on a node that has them")
    replies = config.prompts_per_step * config.generations_per_prompt
    if replies % num_gpus:
        raise ConfigError(
            f"prompts_per_step * generations_per_prompt = {replies} replies cannot be spread evenly over "
            f"{num_gpus} GPUs; use a multiple"
        )


STAGE = Stage(
    name="reinforce",
    config=ReinforceConfig,
    runtime="rl",
    inputs=(
        model("model", "distilled checkpoint"),
        dataset("prompts", "verifiable problems"),
        dataset("traces", "output of generate_traces: the parent's mean lengths"),
    ),
    outputs=(model("policy", "manifest of the policy's checkpoint, with `training.jsonl`"),),
    makes_weights=True,
    step_field="name",
    trains=True,
)

"""Global knowledge distillation on NeMo AutoModel: KL on logits and cosine of hidden states, experts and router frozen.
Resumes exactly from its last checkpoint.
"""

from typing import Annotated, Literal

from pydantic import Field

from moesaic.core.config import Amount, Balance, Config, Efforts, Positive, Precision
from moesaic.core.errors import ConfigError
from moesaic.core.stage import Stage, dataset, model
from moesaic.recover.training import OptimizerConfig, Trainable

Context = Literal["trace", "row"]


class DistillConfig(Config):
    """Global knowledge distillation from the parent, experts and router frozen (paper A, 84B tokens at 128K)."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of KL(parent || child) over the vocabulary, per response token."""
    hidden_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of 1 - cosine of the hidden states, averaged over layers and response tokens."""
    hidden_tokens: Positive = 8192
    """Response tokens of one forward pass whose hidden states are compared, drawn at random where there are more."""
    lm_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the cross entropy with the traces' own tokens (paper B: it hurts)."""
    temperature: Amount = 1.0
    """Both distributions of the KL are softened by it; its gradient is scaled by its square."""
    balance: Balance = "token"
    """Whether every response token counts alike, or every trace: then short replies, as at low effort, weigh more."""
    logits_chunk_tokens: Positive = 1024
    """Tokens whose logits are held at once."""
    activation_checkpointing: bool = True
    """On GPUs: a layer keeps its input only and is computed again for its gradient."""
    expert_chunk_tokens: Positive = 8192
    """On GPUs: tokens of one rank that go through a layer's experts at once."""
    trainable: tuple[Trainable, ...] = ("attention", "norms", "embedding", "head")
    """What learns. Experts never do; without ``router`` neither does it."""
    efforts: Efforts = ("low", "medium", "high")
    """Traces of these efforts are used."""
    sequence_tokens: Positive = 131072
    """Traces are packed into rows of this length; those longer are left out and counted."""
    context: Context = "trace"
    """What a reply sees: its own trace, at whose start positions restart, or all that stands before it in the row;
    positions then run on, and contexts are as long as rows even where traces are short."""
    rows_per_step: Positive = 32
    """Rows of one optimiser step, over all ranks."""
    rows_per_forward: Positive = 1
    """Rows of one rank that go through the model at once; the rest is gradient accumulation."""
    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimiser steps. 0 hands the child on as it is."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights move."""
    evaluate_every_steps: Positive = 100
    """The loss on held-out traces is computed this often, and at the end."""
    checkpoint_every_steps: Positive = 100
    """A killed run resumes from the last of these."""
    divergence_ratio: Annotated[float, Field(gt=1)] = 3.0
    """Stop with an error when the running loss exceeds the lowest one by this factor."""
    seed: int = 0
    """For the order of the data."""
    precision: Precision = "bfloat16"
    """What the models compute in. What learns is kept in float32, and so is its optimiser; experts in bfloat16."""


def check_batch(config: DistillConfig, num_processes: int) -> None:
    """A step's rows must be a whole number of forward passes on every rank.

    Raises:
        ConfigError: saying what would fit.
    """
    rows = num_processes * config.rows_per_forward
    if config.rows_per_step % rows:
        raise ConfigError(
            f"rows_per_step {config.rows_per_step} is not a multiple of {num_processes} processes x rows_per_forward "
            f"{config.rows_per_forward} = {rows}; choose such a multiple, or another rows_per_forward"
        )


STAGE = Stage(
    name="distill",
    config=DistillConfig,
    runtime="train",
    inputs=(
        model("child", "pruned checkpoint"),
        model("parent", "the teacher"),
        dataset("traces", "output of generate_traces"),
    ),
    outputs=(model("trained", "manifest of the child's checkpoint, with `training.jsonl`"),),
    makes_weights=True,
    trains=True,
)

"""The parent answers every prompt at each effort; its answers, as token ids, are what distillation learns from.

Deterministic per seed, as far as a server is; a killed run goes on at the last finished chunk.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from moesaic.core.config import Amount, Config, Efforts, GeneratingEngine, Positive, Precision
from moesaic.core.stage import Stage, dataset, model
from moesaic.deploy.export_engine.stage import ExportEngineConfig


class GenerateTracesConfig(Config):
    """The parent's own answers, which distillation learns from (paper A: prompts answered by the parent)."""

    engine: GeneratingEngine = "in_process"
    """What replies: this process, which holds the whole model unpacked, or a server: ``moesaic serve``;
    ``trtllm-serve`` or ``vllm serve`` on an export bundle; or one that is running."""
    bundle: ExportEngineConfig | None = None
    """How a checkpoint becomes the bundle that the engine serves, where the model is no bundle already."""
    efforts: Efforts = ("low", "medium", "high")
    """Reasoning efforts to answer every prompt at."""
    max_prompts: Positive | None = None
    """Prompts to use, spread evenly over the tasks. None: all."""
    samples_per_prompt: Positive = 1
    """Answers to each prompt at each effort."""
    max_new_tokens: Positive = 512
    """Generation stops here; a truncated trace is recorded as such."""
    keep_truncated: bool = False
    """Whether truncated traces are handed on; their share is recorded either way."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the prompts whose traces are kept for evaluation, never trained on."""
    batch_size: Positive = 128
    """Requests generated together; with a server, those in flight at once."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 decodes greedily; otherwise tokens are sampled at this temperature."""
    seed: int = 0
    """For sampling and for the choice of held-out prompts."""
    precision: Precision = "float32"
    """What the model computes in, in process or under ``moesaic``."""
    startup_timeout_s: Amount = 1800.0
    """A server must answer within this."""
    reply_timeout_s: Amount = 7200.0
    """A server must be done with one reply within this."""

    @model_validator(mode="after")
    def _different_samples(self) -> Self:
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError("samples_per_prompt above 1 needs a temperature: greedy answers are all the same")
        return self


STAGE = Stage(
    name="generate_traces",
    config=GenerateTracesConfig,
    runtime="search",
    inputs=(
        model("model", "the model that answers, or an export bundle of it"),
        dataset("prompts", "verifiable problems"),
    ),
    outputs=(
        dataset(
            "traces",
            "`traces.jsonl` and `summary.json`: accuracy, mean length and share of truncated replies per effort",
        ),
    ),
)

"""A deployment bundle for TensorRT-LLM or vLLM: the checkpoint as that engine reads it, its model module, its settings,
and a manifest of every file; files and layout are checked, no engine loads it. See `docs/export.md`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moesaic.core.config import Config, EmulatedCache, ExportTarget, Positive
from moesaic.core.stage import Stage, model


class ExportEngineConfig(Config):
    """A deployment bundle: the checkpoint as a serving engine reads it, and how that engine is started."""

    target: ExportTarget
    """The engine."""
    kv_cache: EmulatedCache = "fp8"
    """What the engine's KV cache stores: BF16, FP8 at scale 1, or FP8 by the scales that ``calibrate_kv`` found."""
    max_seq_len: Positive | None = None
    """Prompt and reply of one request, in tokens, at most. None: the model's positions."""
    max_batch_size: Positive = 256
    """Requests that the engine works on at once, at most."""
    max_num_tokens: Positive = 8192
    """Tokens of one engine step, prompts and replies of all requests together."""
    tensor_parallel_size: Positive = 1
    """GPUs that share every layer."""
    expert_parallel_size: Positive = 1
    """Groups of those GPUs that share out whole experts; vLLM knows only 1 and all."""
    gpu: Literal["hopper", "blackwell"] = "hopper"
    """Whose expert kernels TensorRT-LLM is told to use: it chooses well by itself only for models that it knows."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """For TensorRT-LLM the share of free GPU memory that the KV cache takes; for vLLM the share of all that it uses."""
    prefix_reuse: bool = False
    """Whether requests reuse the KV cache of a common start."""
    compare_outputs: bool = True
    """Load child and bundle whole and compare their logits; False where they do not fit into memory twice."""

    @property
    def programs(self) -> tuple[str, ...]:
        """What must have code for the model's family, as :meth:`~moesaic.models.families.family.Family.check_adapter`
        names it."""
        return (self.target,) if self.kv_cache == "bf16" else (self.target, "fp8_cache")

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} is less than max_batch_size {self.max_batch_size}; "
                "a step needs a token of every request"
            )
        allowed = (1, self.tensor_parallel_size) if self.target == "vllm" else range(1, self.tensor_parallel_size + 1)
        if self.expert_parallel_size not in allowed or self.tensor_parallel_size % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size {self.expert_parallel_size} does not go with tensor_parallel_size "
                f"{self.tensor_parallel_size}; TensorRT-LLM takes a divisor of it, vLLM 1 or all of it"
            )
        return self


STAGE = Stage(
    name="export_engine",
    config=ExportEngineConfig,
    runtime="search",
    inputs=(
        model(
            "child", "checkpoint to serve, with scales from `calibrate_kv` where the KV cache is to be calibrated FP8"
        ),
    ),
    outputs=(model("bundle", "manifest of the bundle"),),
    makes_weights=True,
)

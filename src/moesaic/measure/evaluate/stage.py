"""Measures accuracy and generated tokens per task and reasoning effort."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moesaic.core.config import Amount, Config, Efforts, EmulatedCache, GeneratingEngine, Positive, Precision
from moesaic.core.stage import Stage, artifact, dataset, model
from moesaic.deploy.export_engine.stage import ExportEngineConfig

Split = Literal["validation", "test"]


class EvaluateConfig(Config):
    """Accuracy and generated tokens on verifiable problems."""

    name: str | None = None
    """What the report calls the model. None: the candidate that the checkpoint says it is, or ``parent``."""
    engine: GeneratingEngine = "in_process"
    """What replies: this process, which holds the whole model unpacked, or a server: ``moesaic serve``;
    ``trtllm-serve`` or ``vllm serve`` on an export bundle; or one that is running."""
    bundle: ExportEngineConfig | None = None
    """How a checkpoint becomes the bundle that the engine serves, where the model is no bundle already."""
    split: Split = "test"
    """What the problems given are for: choices, or figures that nothing was chosen by; recorded with their digest."""
    efforts: Efforts = ("low", "medium", "high")
    """Reasoning efforts to ask for."""
    problems_per_task: Positive = 100
    """Problems of each task, from the start of the set."""
    epochs: Positive = 1
    """Replies to each problem at each effort."""
    max_new_tokens: Positive = 512
    """Generation stops here; a truncated answer is wrong."""
    batch_size: Positive = 128
    """Requests generated together; with a server, those in flight at once."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 decodes greedily; otherwise tokens are sampled at this temperature."""
    kv_cache: EmulatedCache | None = None
    """Round what the KV cache stores: to BF16, to FP8 as it is, or to FP8 by the checkpoint's scales. None: not so.
    ``in_process`` and ``moesaic`` emulate it, an export bundle must have been made for it, and a running server must
    have been set up so."""
    seed: int = 0
    """For sampling."""
    precision: Precision = "float32"
    """What the model computes in, in process or under ``moesaic``."""
    startup_timeout_s: Amount = 1800.0
    """A server must answer within this."""
    reply_timeout_s: Amount = 7200.0
    """A server must be done with one reply within this."""

    @model_validator(mode="after")
    def _different_epochs(self) -> Self:
        if self.epochs > 1 and self.temperature == 0:
            raise ValueError("epochs above 1 need a temperature: greedy answers are all the same")
        return self

    @model_validator(mode="after")
    def _cache_is_named(self) -> Self:
        if self.engine == "moesaic" and self.kv_cache is None:
            raise ValueError("engine 'moesaic' always rounds what its KV cache stores; say how, such as kv_cache bf16")
        if self.bundle is not None and self.bundle.kv_cache != self.kv_cache:
            raise ValueError(f"the bundle's kv_cache is {self.bundle.kv_cache!r}, this kv_cache {self.kv_cache!r}")
        return self

    def with_kv_cache(self, kind: EmulatedCache) -> Self:
        """The same with another KV cache, its bundle's included."""
        bundle = self.bundle and self.bundle.model_copy(update={"kv_cache": kind})
        return self.model_copy(update={"kv_cache": kind, "bundle": bundle})


STAGE = Stage(
    name="evaluate",
    config=EvaluateConfig,
    runtime="search",
    inputs=(
        model("model", "parent, child or baseline, or an export bundle of it"),
        dataset("tests", "verifiable problems"),
    ),
    outputs=(artifact("evaluation", "`evaluation.json` and `samples.jsonl`"),),
)

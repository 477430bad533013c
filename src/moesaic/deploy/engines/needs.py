"""What an engine that replies has in flight, and where it can run, for the plan of a stage that asks it."""

from typing import TYPE_CHECKING

from moesaic.core.errors import ConfigError
from moesaic.costs.facts import Facts, Placement
from moesaic.costs.generation import Requests

if TYPE_CHECKING:
    from moesaic.deploy.engines.served_replies import AsksServer
    from moesaic.deploy.export_engine.stage import ExportEngineConfig


def requests_of(config: "AsksServer", facts: Facts) -> Requests:
    """The requests of a stage: prompts of the assumed length, and the longest replies; a bundle's limit counts, too."""
    bundle = config.bundle
    target_gpus = facts.target.num_gpus if facts.target else 1
    return Requests(
        in_flight=min(config.batch_size, bundle.max_batch_size) if bundle else config.batch_size,
        longest=facts.assumed.prompt_tokens + config.max_new_tokens,
        engine=config.engine,
        precision=config.precision,
        kv_cache="fp8" if bundle and bundle.kv_cache != "bf16" else "bf16",
        num_gpus=bundle.tensor_parallel_size if bundle else target_gpus,
    )


def check_engine(engine: str, bundle: "ExportEngineConfig", placement: Placement) -> None:
    """Raise ConfigError if the image has no TensorRT-LLM, or the node fewer GPUs than share the bundle's layers."""
    if engine not in ("tensorrt_llm", "vllm"):
        return
    stage, gpus, needed = placement.stage, placement.num_gpus, bundle.tensor_parallel_size
    if engine == "tensorrt_llm" and not placement.has_tensorrt_llm:
        raise ConfigError(
            f"engine '{engine}' is not in the image of {stage}; name serve's image for it under `images`, or choose "
            "another engine"
        )
    if gpus < needed and (engine == "tensorrt_llm" or needed > 1):
        raise ConfigError(
            f"engine '{engine}' needs tensor_parallel_size {needed} GPUs, and the node of {stage} has {gpus}; "
            "choose a larger kind of node under `stages`, or a smaller tensor_parallel_size"
        )

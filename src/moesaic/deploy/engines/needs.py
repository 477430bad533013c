"""What an engine that replies has in flight, for the plan of a stage that asks it."""

from typing import TYPE_CHECKING

from moesaic.costs.facts import Facts
from moesaic.costs.generation import Requests

if TYPE_CHECKING:
    from moesaic.deploy.engines.served_replies import AsksServer


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

"""Whether a child's experts can be spread evenly over the ranks of an expert-parallel group; nothing heavy is imported.

AutoModel gives every rank ``E_i / ep_size`` experts of layer i and checks one ``E`` for the whole model. In a child
every layer has its own ``E_i``, so all of them are checked here, before a process starts or a weight is read.
"""

from moesaic.core.errors import ConfigError
from moesaic.models.architecture import Architecture


def check_expert_parallel(architecture: Architecture, ep_size: int) -> None:
    """Every layer's experts must divide evenly among ``ep_size`` ranks.

    Raises:
        ConfigError: naming the first layer whose experts do not, and what would fit.
    """
    if ep_size < 1:
        raise ConfigError(f"an expert-parallel group of {ep_size} ranks does not exist; use 1 or more")
    for layer, block in enumerate(architecture.blocks):
        if block.num_experts % ep_size:
            fitting = [size for size in range(1, ep_size) if _fits(architecture, size)]
            raise ConfigError(
                f"layer {layer} has {block.num_experts} experts, which {ep_size} expert-parallel ranks cannot share "
                f"evenly; use an expert-parallel size of {', '.join(map(str, fitting))}, or search with "
                f"expert_parallel_size {ep_size}"
            )


def _fits(architecture: Architecture, ep_size: int) -> bool:
    return all(block.num_experts % ep_size == 0 for block in architecture.blocks)

"""vLLM plugin: GLM-4.5 children whose layers differ in experts, their width, experts per token and attention window.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in each of its processes, more than once
perhaps. Importing this package imports neither torch nor the model.
"""

from .engine_checks import check_version

ARCHITECTURE = "Glm4MoePuzzleForCausalLM"


def register() -> None:
    """Teach vLLM and transformers the model type ``glm4_moe_puzzle``.

    Raises:
        RuntimeError: if this is not a vLLM that the plugin is written to.
    """
    check_version()

    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .configuration_glm4_moe_puzzle import Glm4MoePuzzleConfig

    AutoConfig.register(Glm4MoePuzzleConfig.model_type, Glm4MoePuzzleConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")

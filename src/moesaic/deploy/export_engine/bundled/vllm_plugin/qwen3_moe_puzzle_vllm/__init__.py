"""vLLM plugin: Qwen3-MoE children whose layers differ in experts, their width, experts per token and attention window.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in each of its processes, more than once
perhaps. Importing this package imports neither torch nor the model.
"""

from .engine_checks import check_version

ARCHITECTURE = "Qwen3MoePuzzleForCausalLM"


def register() -> None:
    """Teach vLLM and transformers the model type ``qwen3_moe_puzzle``.

    Raises:
        RuntimeError: if this is not a vLLM that the plugin is written to.
    """
    check_version()

    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .configuration_qwen3_moe_puzzle import Qwen3MoePuzzleConfig

    AutoConfig.register(Qwen3MoePuzzleConfig.model_type, Qwen3MoePuzzleConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")

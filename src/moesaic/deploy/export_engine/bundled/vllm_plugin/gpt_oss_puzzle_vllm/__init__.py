"""vLLM plugin: gpt-oss children whose layers differ in experts, their width, experts per token and attention window.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in each of its processes, more than once
perhaps. Importing this package imports neither torch nor the model.
"""

from .engine_checks import check_version

ARCHITECTURE = "GptOssPuzzleForCausalLM"


def register() -> None:
    """Teach vLLM and transformers the model type ``gpt_oss_puzzle``.

    Raises:
        RuntimeError: if this is not a vLLM that the plugin is written to.
    """
    check_version()

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, GptOssForCausalLMConfig
    from vllm.platforms import current_platform

    from .config import EngineConfig

    AutoConfig.register("gpt_oss_puzzle", EngineConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = GptOssForCausalLMConfig  # gpt-oss's parsers, and its name for MXFP4
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    if current_platform.is_cpu():
        from .unpacked_experts import register_where_needed

        register_where_needed()

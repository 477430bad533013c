"""The child's config as vLLM reads it."""

from typing import Any

from .configuration_gpt_oss_puzzle import GptOssPuzzleConfig


class EngineConfig(GptOssPuzzleConfig):
    """Says it is a ``gpt_oss``: by that name vLLM chooses the interleaved MXFP4 kernels and the Harmony parsers.

    The plain MXFP4 kernels, which any other type gets, expect another order of gate and up and load without an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_type = "gpt_oss"

"""The child's own model class, and the one place where Moesaic loads whole models.

The two modules beside this one are copied into every child checkpoint, so that it loads in plain transformers with
``trust_remote_code=True``; here they are registered instead, and no remote code runs.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.utils import logging as transformers_logging

from moesaic.models import attention
from moesaic.models.checkpoint import Checkpoint

from .configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from .modeling_gpt_oss_puzzle import GptOssPuzzleForCausalLM


def register() -> None:
    """Let transformers' auto classes find ``gpt_oss_puzzle``; calling it again changes nothing."""
    AutoConfig.register("gpt_oss_puzzle", GptOssPuzzleConfig, exist_ok=True)
    AutoModelForCausalLM.register(GptOssPuzzleConfig, GptOssPuzzleForCausalLM, exist_ok=True)


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a parent or a child for inference, experts unpacked to ``dtype``.

    Raises:
        ArtifactError: if the checkpoint is missing, damaged or of another family.
    """
    Checkpoint.open(directory)
    register()
    attention.register()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns that MXFP4 is unpacked, which is what is meant to happen
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False, local_files_only=True
    )
    for module in model.modules():
        if isinstance(module, GptOssExperts):
            module.to(
                dtype
            )  # transformers unpacks MXFP4 to bfloat16 whatever it is asked for; the values are exact in it
    return model.eval()

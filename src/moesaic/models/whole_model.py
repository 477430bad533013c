"""The one place where Moesaic loads whole models.

A child's two modules (``moesaic.models.families``) are copied into its checkpoint, so that it loads in plain
transformers with ``trust_remote_code=True``; here they are registered instead, and no remote code runs.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moesaic.models import attention, layout, loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families import FAMILIES
from moesaic.models.generation import read_generation_config
from moesaic.models.resolved_config import as_class

_OF_FILES = ("quantization_config", "auto_map")
"""Keys that say how the weights and the classes lie in files."""


def register() -> None:
    """Let transformers' auto classes find children of every family; calling it again changes nothing."""
    for family in FAMILIES.values():
        config = family.of_child("Config")
        AutoConfig.register(family.child_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, family.of_child("ForCausalLM"), exist_ok=True)


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a parent or a child for inference: transformers' class, and the weights that our own reader finds.

    All weights are in ``dtype``, to which experts are unpacked, but for what the layout has in F32.

    Raises:
        ArtifactError: if the checkpoint is missing, damaged or of another family.
    """
    checkpoint = Checkpoint.open(directory)
    register()
    attention.register()
    config = as_class({key: value for key, value in checkpoint.config.items() if key not in _OF_FILES})
    config.name_or_path = str(directory)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
        )
    for layer in range(checkpoint.num_layers):
        stored = {name: checkpoint.stored(name).read() for name in checkpoint.layer_names(layer)}
        unpacked = loading.unpacked_layer(checkpoint, layer, stored, dtype)
        state = {name: tensor.contiguous() for name, tensor in unpacked.items()}  # FSDP takes no others
        model.model.layers[layer].load_state_dict(state, assign=True)
    names = layout.outer_specs(checkpoint.shape)
    outer = {name: loading.check_finite(name, checkpoint.stored(name).read()).to(dtype) for name in names}
    model.load_state_dict(outer, assign=True, strict=False)
    model.model.rotary_emb = checkpoint.shape.family.of_transformers("RotaryEmbedding")(config)
    model.generation_config = read_generation_config(checkpoint)
    return model.eval()

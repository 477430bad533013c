"""A model's config as its own transformers class resolves it, whatever ``config.json`` spells or leaves out.

Every formula, every child and every engine goes by these values. What the file says must be what they are: where two
spellings differ, or the class computes with another constant, the config is refused.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import read_json_object
from moesaic.models import gpt_oss

CONFIG = "config.json"
_CONSTANTS = {
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "swiglu_limit": 7.0,
}
"""What every model of the family computes with."""
_CLASSES = ("GptOssForCausalLM", gpt_oss.CHILD_CLASS)
"""What engines choose the model's code by."""
_ALIASES = {"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"}
"""Second names, which are left out: in a child they would go on naming its parent's value."""
_READ_HERE = (
    "quantization_config",
    "auto_map",
    "block_configs",
    "rope_scaling",
    "rope_theta",
    "initial_context_length",
)
"""Keys that the class has no default for."""
_SIZES = (
    "num_hidden_layers",
    "num_local_experts",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "num_experts_per_tok",
)
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_YARN = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
"""What the engines' gpt-oss reads of RoPE, and all of it; the type is always ``yarn``."""
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""What transformers takes where a config says nothing; engines have no defaults."""
_WHOLE_HEAD = ("partial_rotary_factor", 1.0)
"""A key of RoPE at the value that changes nothing."""


def read_config_file(directory: Path) -> dict[str, Any]:
    """The resolved config of a checkpoint.

    Raises:
        ArtifactError: if it is missing, not of the family, or its class refuses it; the message names the key.
    """
    path = directory / CONFIG
    missing = f"{path} does not exist; a model is a directory with {CONFIG} and safetensors files"
    try:
        return resolve(read_json_object(path, missing))
    except ArtifactError as wrong:
        raise wrong if str(path) in str(wrong) else ArtifactError(f"{path}: {wrong}") from wrong


def resolve(given: Mapping[str, Any]) -> dict[str, Any]:
    """Put the resolved values into a config; RoPE stands in it in both spellings, old and new.

    Raises:
        ArtifactError: for a value that the model's class refuses or would not use.
    """
    config = as_class(given)
    values = dict(given) | {key: getattr(config, key) for key in GptOssConfig.__annotations__}
    if given["model_type"] == gpt_oss.CHILD_TYPE:
        values["block_configs"] = config.block_configs
    if (dtype := given.get("dtype", given.get("torch_dtype"))) is not None:
        values["dtype"] = dtype
    rope = _resolved_rope(values["rope_parameters"])
    theta = rope.pop("rope_theta")
    values.update(rope_theta=theta, rope_scaling=rope, rope_parameters={**rope, "rope_theta": theta})
    _check(given, values)
    _check_rope(given, values)
    _check_angles(config)
    return {key: value for key, value in values.items() if key not in _ALIASES}


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config that neither its class nor anything here reads."""
    known = _class_of(config["model_type"])()
    return sorted(key for key in config if not hasattr(known, key) and key not in {*_READ_HERE, *_CONSTANTS})


def as_class(given: Mapping[str, Any]) -> GptOssConfig:
    """A config as an object of the model's own class.

    Raises:
        ArtifactError: if the class refuses it.
    """
    kind = given.get("model_type")
    if kind not in (gpt_oss.PARENT_TYPE, gpt_oss.CHILD_TYPE):
        raise ArtifactError(
            f"model_type is {kind!r}; Moesaic reads {gpt_oss.PARENT_TYPE!r} and {gpt_oss.CHILD_TYPE!r} checkpoints"
        )
    if kind == gpt_oss.PARENT_TYPE and given.get("per_layer_config"):
        raise ArtifactError(
            f"per_layer_config says that layers differ, which {kind!r} does not build; a model whose layers differ has "
            f"model_type {gpt_oss.CHILD_TYPE!r}"
        )
    flat = copy.deepcopy(dict(given)) | {
        key: _of_all_layers(key, given[key]) for key in ("rope_scaling", "rope_parameters") if key in given
    }
    try:
        config: GptOssConfig = _class_of(kind).from_dict(flat)
    except Exception as refused:  # the class checks values by errors of many kinds
        raise ArtifactError(f"{kind} does not take these values: {' '.join(str(refused).split())}") from refused
    return config


def _class_of(kind: str) -> type[GptOssConfig]:
    from moesaic.models.gpt_oss_puzzle.configuration_gpt_oss_puzzle import GptOssPuzzleConfig  # it needs the reader

    return GptOssPuzzleConfig if kind == gpt_oss.CHILD_TYPE else GptOssConfig


def _of_all_layers(key: str, rope: Any) -> Any:
    """RoPE that is spelt per layer type, as one, which the family has."""
    per_type = [rope[kind] for kind in gpt_oss.LAYER_TYPES if kind in rope] if isinstance(rope, dict) else []
    if not per_type:
        return copy.deepcopy(rope)
    if len(rope) > len(per_type) or any(other != per_type[0] for other in per_type):
        raise ArtifactError(f"{key} differs by layer type ({rope}); this family has one RoPE for all layers")
    return copy.deepcopy(per_type[0])


def _check(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for key, constant in _CONSTANTS.items():
        if values.get(key, constant) != constant:
            raise ArtifactError(f"{key} is {values[key]!r}; models of this family compute with {constant!r} always")
    if given.get("torch_dtype", values.get("dtype")) != values.get("dtype"):
        raise ArtifactError(f"torch_dtype is {given['torch_dtype']!r} but dtype {values['dtype']!r}; keep one")
    if classes := [name for name in given.get("architectures") or () if name not in _CLASSES]:
        raise ArtifactError(f"architectures names {classes[0]!r}; engines would run that, allowed are {_CLASSES}")
    for key, meant in _ALIASES.items():
        if given.get(key, values[meant]) != values[meant]:
            raise ArtifactError(f"{key} is {given[key]!r} but {meant} is {values[meant]!r}; they mean the same")
    for key in _SIZES:
        if values[key] < 1:
            raise ArtifactError(f"{key} is {values[key]}; it must be at least 1")
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise ArtifactError(f"num_key_value_heads {values['num_key_value_heads']} does not divide the number of heads")
    if not 0 < values["rms_norm_eps"] < 1:
        raise ArtifactError(f"rms_norm_eps is {values['rms_norm_eps']}; it must be between 0 and 1")
    for layer, kind in enumerate(values["layer_types"]):
        if kind not in gpt_oss.LAYER_TYPES:
            raise ArtifactError(f"layer_types[{layer}] is {kind!r}; allowed are {', '.join(gpt_oss.LAYER_TYPES)}")
    for key in _TOKENS:
        ids = values[key] if isinstance(values[key], list) else [] if values[key] is None else [values[key]]
        if wrong := [token for token in ids if not 0 <= token < values["vocab_size"]]:
            raise ArtifactError(f"{key} is {wrong[0]}; the vocabulary has ids 0 to {values['vocab_size'] - 1}")


def _resolved_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE with the values that transformers takes where it says nothing; nothing else may stand in it."""
    if rope["rope_type"] != "yarn":
        raise ArtifactError(f"rope_type is {rope['rope_type']!r}; the engines' gpt-oss is always 'yarn'")
    given = {key: value for key, value in rope.items() if value is not None}
    for key, value in given.items():
        if key not in (*_YARN, "type") and (key, value) != _WHOLE_HEAD:
            raise ArtifactError(
                f"RoPE has {key} = {value!r}, which engines do not read; allowed are {', '.join(_YARN)}; remove it"
            )
    if missing := [key for key in _YARN if key not in given and key not in _YARN_DEFAULTS]:
        raise ArtifactError(f"RoPE has no {missing[0]}, which engines read; write it into config.json")
    return {key: given.get(key, _YARN_DEFAULTS.get(key)) for key in _YARN}


def _check_rope(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    resolved = values["rope_parameters"]
    for place, key, value in _spelt_rope(given):
        if value is not None and resolved.get(key) != value and (key, value) != _WHOLE_HEAD:
            raise ArtifactError(
                f"RoPE is spelt in ways that differ: {key} is {value} in {place}, and {resolved.get(key)} by all that "
                "the config says; engines read the one or the other, so make them the same"
            )


def _spelt_rope(given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every value of RoPE that the config names: its place, its key as resolved, and the value."""
    for place in ("rope_scaling", "rope_parameters"):
        for key, value in (_of_all_layers(place, given.get(place)) or {}).items():
            yield place, "rope_type" if key == "type" else key, value
    for key, meant in (("rope_theta", "rope_theta"), ("initial_context_length", "original_max_position_embeddings")):
        yield f"the key {key}", meant, given.get(key)


def _check_angles(config: GptOssConfig) -> None:
    """Compute the angles: that is what shows a value that is missing, of the wrong type, or not finite."""
    try:
        rotary = GptOssRotaryEmbedding(config)
        frequencies, scaling = rotary.inv_freq, torch.tensor(float(rotary.attention_scaling))
    except Exception as refused:  # the formulas check nothing
        raise ArtifactError(f"RoPE {config.rope_parameters} cannot be computed: {refused!r}") from refused
    if len(frequencies) != config.head_dim // 2 or not (frequencies.isfinite().all() and scaling.isfinite()):
        raise ArtifactError(f"RoPE {config.rope_parameters} does not turn all of a head of {config.head_dim}")

"""A model's config as its own transformers class resolves it, whatever ``config.json`` spells or leaves out.

Every formula, every child and every engine goes by these values. What the file says must be what they are: where two
spellings differ, or the class computes with another constant, the config is refused.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import read_json_object
from moesaic.models import layout
from moesaic.models.families.family import Family

CONFIG = "config.json"
_READ_HERE = (
    "quantization_config",
    "auto_map",
    "block_configs",
    "head_dim",
    "rope_scaling",
    "rope_theta",
    "initial_context_length",
    "partial_rotary_factor",
)
"""Keys that the class has no default for."""
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""What transformers takes where a config says nothing; engines have no defaults."""
_PARTIAL = "partial_rotary_factor"
"""The share of a head that RoPE turns, in families whose RoPE has it; it stands beside ``rope_parameters`` as well."""
_WHOLE_HEAD = (_PARTIAL, 1.0)
"""A key of RoPE at the value that changes nothing."""
_OTHER_PARTS = ("quantization", "decoder", "generator", "text_encoder")
"""Keys whose values, like those of keys in ``_config``, are of a part of a model, or of another program's format."""
_OWN_PARTS = ("quantization_config", "per_layer_config")


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
    family = layout.family_of(given)
    _check_parts(given)
    config = as_class(given)
    keys = family.of_transformers("Config").__annotations__
    values = dict(given) | {key: getattr(config, key) for key in (*keys, *family.aliases.values())}
    values["head_dim"] = _head_dim(config)
    if given["model_type"] == family.child_type:
        values["block_configs"] = config.block_configs
    if (dtype := given.get("dtype", given.get("torch_dtype"))) is not None:
        values["dtype"] = dtype
    rope = _resolved_rope(values["rope_parameters"], family)
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    values.update(rope_theta=theta, rope_scaling=scaling, rope_parameters={**rope, "rope_theta": theta})
    _check(given, values, family)
    if _PARTIAL in rope:
        values[_PARTIAL] = rope[_PARTIAL]
    _check_rope(given, values)
    _check_angles(config, family, rope.get(_PARTIAL, 1.0))
    return {key: value for key, value in values.items() if key not in family.aliases}


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config that neither its class nor anything here reads."""
    family = layout.family_of(config)
    known, is_parent = _class_of(config, family)(), config["model_type"] == family.parent_type
    read = {*_READ_HERE, *family.constants} - ({"auto_map"} if is_parent else set())
    return sorted(key for key in config if key not in read and (key == "auto_map" or not hasattr(known, key)))


def as_class(given: Mapping[str, Any]) -> PreTrainedConfig:
    """A config as an object of the model's own class.

    Raises:
        ArtifactError: if the class refuses it.
    """
    kind, family = given.get("model_type"), layout.family_of(given)
    if kind == family.parent_type and given.get("per_layer_config"):
        raise ArtifactError(
            f"per_layer_config says that layers differ, which {kind!r} does not build; a model whose layers differ has "
            f"model_type {family.child_type!r}"
        )
    flat = copy.deepcopy(dict(given)) | {
        key: _of_all_layers(key, given[key]) for key in ("rope_scaling", "rope_parameters") if key in given
    }
    try:
        config: PreTrainedConfig = _class_of(given, family).from_dict(flat)
    except Exception as refused:  # the class checks values by errors of many kinds
        raise ArtifactError(f"{kind} does not take these values: {' '.join(str(refused).split())}") from refused
    return config


def _check_parts(given: Mapping[str, Any]) -> None:
    """Refuse configs within the config: what they say is read by neither the class nor anything here."""
    if not isinstance(given.get("quantization_config"), Mapping | None):
        raise ArtifactError(
            f"quantization_config is {given['quantization_config']!r:.100}; it must be an object, or null"
        )
    for key, value in given.items():
        is_part = key in _OTHER_PARTS or (key.endswith("_config") and key not in _OWN_PARTS)
        if is_part and isinstance(value, Mapping) and value:
            raise ArtifactError(
                f"{key} = {dict(value)!r:.100} is of a model with parts, or in a format, that Moesaic does not read; "
                "give the language model by itself, with its values in config.json itself, and not quantized so"
            )


def _class_of(config: Mapping[str, Any], family: Family) -> type[PreTrainedConfig]:
    is_child = config["model_type"] == family.child_type
    found: type[PreTrainedConfig] = family.of_child("Config") if is_child else family.of_transformers("Config")
    return found


def _head_dim(config: PreTrainedConfig) -> int:
    """What the attention takes: without the key, heads share out the hidden size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _of_all_layers(key: str, rope: Any) -> Any:
    """RoPE that is spelt per layer type, as one, which the family has."""
    per_type = [rope[kind] for kind in layout.LAYER_TYPES if kind in rope] if isinstance(rope, dict) else []
    if not per_type:
        return copy.deepcopy(rope)
    if len(rope) > len(per_type) or any(other != per_type[0] for other in per_type):
        raise ArtifactError(f"{key} differs by layer type ({rope}); this family has one RoPE for all layers")
    return copy.deepcopy(per_type[0])


def _check(given: Mapping[str, Any], values: Mapping[str, Any], family: Family) -> None:
    for key, constant in family.constants.items():
        if values.get(key, constant) != constant:
            raise ArtifactError(f"{key} is {values[key]!r}; models of this family compute with {constant!r} always")
    if given.get("torch_dtype", values.get("dtype")) != values.get("dtype"):
        raise ArtifactError(f"torch_dtype is {given['torch_dtype']!r} but dtype {values['dtype']!r}; keep one")
    classes = (family.parent_class, family.child_class)
    named = given.get("architectures") or []
    if others := [name for name in (named if isinstance(named, list) else [named]) if name not in classes]:
        raise ArtifactError(f"architectures names {others[0]!r}; engines would run that, allowed are {classes}")
    if not isinstance(named, list):
        raise ArtifactError(f"architectures is {named!r}; it must be a list")
    for key, meant in family.aliases.items():
        if given.get(key, values[meant]) != values[meant]:
            raise ArtifactError(f"{key} is {given[key]!r} but {meant} is {values[meant]!r}; they mean the same")
    for key in family.sizes:
        if not 1 <= values[key] < 2**31:
            raise ArtifactError(f"{key} is {values[key]}; it must be at least 1, and less than 2^31")
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise ArtifactError(f"num_key_value_heads {values['num_key_value_heads']} does not divide the number of heads")
    if not 0 < values["rms_norm_eps"] < 1:
        raise ArtifactError(f"rms_norm_eps is {values['rms_norm_eps']}; it must be between 0 and 1")
    for layer, kind in enumerate(values.get("layer_types") or ()):
        if kind not in layout.LAYER_TYPES:
            raise ArtifactError(f"layer_types[{layer}] is {kind!r}; allowed are {', '.join(layout.LAYER_TYPES)}")
    for key in _TOKENS:
        ids = values[key] if isinstance(values[key], list) else [] if values[key] is None else [values[key]]
        if wrong := [token for token in ids if not 0 <= token < values["vocab_size"]]:
            raise ArtifactError(f"{key} is {wrong[0]}; the vocabulary has ids 0 to {values['vocab_size'] - 1}")


def _resolved_rope(rope: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """RoPE with the values that transformers takes where it says nothing; nothing else may stand in it."""
    if (kind := rope["rope_type"]) not in family.rope_types:
        allowed = " or ".join(map(repr, family.rope_types))
        raise ArtifactError(f"rope_type is {kind!r}; the engines' {family.name} is always {allowed}")
    keys = family.rope_types[kind]
    given = {key: value for key, value in rope.items() if value is not None}
    for key, value in given.items():
        if key not in (*keys, "type") and (key, value) != _WHOLE_HEAD:
            raise ArtifactError(
                f"RoPE has {key} = {value!r}, which engines do not read; allowed are {', '.join(keys)}; remove it"
            )
    _check_rope_values(given)
    if missing := [key for key in keys if key not in given and key not in _YARN_DEFAULTS]:
        raise ArtifactError(f"RoPE has no {missing[0]}, which engines read; write it into config.json")
    return {key: given.get(key, _YARN_DEFAULTS.get(key)) for key in keys}


def _check_rope_values(rope: Mapping[str, Any]) -> None:
    """A text that looks like a number, or like a truth, is another value to each program that reads it."""
    for key in ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        if key in rope and (isinstance(rope[key], bool) or not isinstance(rope[key], int | float)):
            raise ArtifactError(f"RoPE has {key} = {rope[key]!r}; it must be a number")
    if not isinstance(rope.get("truncate", True), bool):
        raise ArtifactError(f"RoPE has truncate = {rope['truncate']!r}; it must be true or false")
    if rope.get("factor", 1) < 1:
        raise ArtifactError(f"RoPE has factor = {rope['factor']}; it must be at least 1")


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
    others = {"rope_theta": "rope_theta", "initial_context_length": "original_max_position_embeddings"}
    for key, meant in (others | {_PARTIAL: _PARTIAL}).items():
        yield f"the key {key}", meant, given.get(key)


def _check_angles(config: PreTrainedConfig, family: Family, turned: float) -> None:
    """Compute the angles: that is what shows a value that is missing, of the wrong type, or not finite."""
    try:
        rotary = family.of_transformers("RotaryEmbedding")(config)
        frequencies, scaling = rotary.inv_freq, torch.tensor(float(rotary.attention_scaling))
    except Exception as refused:  # the formulas check nothing
        raise ArtifactError(f"RoPE {config.rope_parameters} cannot be computed: {refused!r}") from refused
    wanted = int((head_dim := _head_dim(config)) * turned) // 2
    if len(frequencies) != wanted or not (frequencies.isfinite().all() and scaling.isfinite()):
        share = "all" if turned == 1 else f"{turned:.0%}"
        raise ArtifactError(f"RoPE {config.rope_parameters} does not turn {share} of a head of {head_dim}")

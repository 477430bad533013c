"""A config is what the model's own class resolves it to, in every spelling; what the class would not use is refused."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from moesaic.core.errors import ArtifactError, MoesaicError
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
from moesaic.models.families.gpt_oss_puzzle.configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from moesaic.models.resolved_config import as_class, read_config_file, resolve

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096}
CLASSES = {"gpt_oss": GptOssConfig, "gpt_oss_puzzle": GptOssPuzzleConfig}
MINIMAL = {"model_type": "gpt_oss", "rope_theta": 150_000, "rope_scaling": YARN}


def angles(config: Any) -> tuple[torch.Tensor, float]:
    rotary = GptOssRotaryEmbedding(config)
    return rotary.inv_freq, float(rotary.attention_scaling)


def same_angles(one: Any, other: Any) -> bool:
    (frequencies, scaling), (expected, wanted) = angles(one), angles(other)
    return torch.equal(frequencies, expected) and scaling == wanted


def test_the_originals_sizes_and_the_released_child_come_back() -> None:
    config = resolve(MINIMAL | {"num_hidden_layers": 36})
    assert layout.read_config(config) == (GPT_OSS_120B, GPT_OSS_120B_BLOCKS)
    child = json.loads(json.dumps(layout.child_config(config, GPT_OSS_PUZZLE_88B_BLOCKS)))
    assert layout.read_config(resolve(child)) == (GPT_OSS_120B, GPT_OSS_PUZZLE_88B_BLOCKS)
    assert child["rope_theta"] == child["rope_parameters"]["rope_theta"] == 150_000
    assert child["rope_scaling"] == YARN


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": None, "rope_theta": 150_000.0},
        {"rope_parameters": None},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "rope_theta": 150_000.0}},
        {"rope_parameters": {**YARN, "rope_theta": 150_000}},
        {"rope_parameters": YARN, "rope_theta": 150_000},
        {"rope_scaling": {("type" if key == "rope_type" else key): value for key, value in YARN.items()}},
        {"rope_scaling": {**YARN, "partial_rotary_factor": 1.0}, "initial_context_length": 4096},
        {"rope_scaling": {**YARN, "beta_fast": None} | {"mscale": None}},
        {"rope_scaling": {key: value for key, value in YARN.items() if not key.startswith("beta_")}},
        {"rope_parameters": {kind: {**YARN, "rope_theta": 150_000} for kind in layout.LAYER_TYPES}},
    ],
)
def test_one_rope_in_every_spelling(spelling: dict[str, Any]) -> None:
    """Absent and null are the class's own default, which is what the originals have."""
    config = resolve({"model_type": "gpt_oss"} | deepcopy(spelling))
    assert config["rope_scaling"] == YARN and config["rope_theta"] == 150_000
    assert config["rope_parameters"] == {**YARN, "rope_theta": 150_000}
    frequencies, scaling = angles(as_class(layout.child_config(config, GPT_OSS_120B_BLOCKS)))
    assert scaling == pytest.approx(1.3466, abs=1e-4) and float(frequencies[0]) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"num_hidden_layers": 35, "layer_types": ["full_attention"] * 36}, "35.*36"),
        ({"layer_types": ["chunked_attention"] * 36}, r"layer_types\[0\] is 'chunked_attention'; allowed are full_att"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"num_local_experts": 3}, "layer 0: .* 3 experts cannot use 4"),
        ({"hidden_size": "2880"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"num_key_value_heads": 7}, "num_key_value_heads 7 does not divide"),
        ({"per_layer_config": {"0": {"num_local_experts": 64}}}, "layers differ, which 'gpt_oss' does not build"),
        ({"experts_per_token": 2}, "experts_per_token is 2 but num_experts_per_tok is 4"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* 'silu' always"),
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"eos_token_id": [2, 201_088]}, "eos_token_id is 201088; the vocabulary has ids 0 to 201087"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; .* always 'yarn'"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_type is 'default'; .* always 'yarn'"),
        ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale = 1.0, which engines do not read"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor = 1.0, which engines do not read"),
        ({"rope_scaling": {**YARN, "factor": None}}, "RoPE has no factor, which engines read"),
        (
            {"initial_context_length": 8192},
            "max_position_embeddings is 8192 in the key initial_context_length",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures names 'LlamaForCausalLM'; engines would run that"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "torch_dtype is 'float16' but dtype 'bfloat16'"),
        ({"attention_dropout": 0.5}, "attention_dropout is 0.5; .* 0.0 always"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "does not turn all of a head|cannot be computed"),
        ({"rope_parameters": {**YARN, "rope_theta": 10_000}}, "rope_theta is 10000 in rope_parameters"),
        ({"rope_parameters": {**YARN, "factor": 8.0}}, "factor is 8.0 in rope_parameters, and 32.0 by all"),
        ({"rope_scaling": {"full_attention": YARN, "sliding_attention": {}}}, "rope_scaling differs by layer type"),
        ({"partial_rotary_factor": 0.5}, "does not turn all of a head|partial_rotary_factor"),
        ({"dtype": "float7"}, "float7"),
        ({"architectures": "GptOssForCausalLM"}, "architectures is .GptOssForCausalLM.; it must be a list"),
        ({"quantization_config": "mxfp4"}, "quantization_config is .mxfp4.; it must be an object"),
        ({"max_position_embeddings": 10**30}, r"it must be at least 1, and less than 2\^31"),
        ({"rope_scaling": {**YARN, "truncate": "false"}}, "RoPE has truncate = .false.; it must be true or false"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "RoPE has factor = 0.5; it must be at least 1"),
        ({"rope_theta": "150000", "rope_scaling": YARN}, "RoPE has rope_theta = .150000.; it must be a number"),
        ({"rope_scaling": {**YARN, "beta_fast": True}}, "RoPE has beta_fast = True; it must be a number"),
        ({"text_config": {"hidden_size": 64}}, "text_config = .* is of a model with parts"),
        ({"vision_config": {"depth": 2}}, "vision_config = .* is of a model with parts"),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            "quantization = .*, or in a format, that Moesaic does not read",
        ),
        ({"dual_chunk_attention_config": {"chunk_size": 9}}, "dual_chunk_attention_config = "),
        ({"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 64}}, "model_type is .qwen3_vl_moe."),
        ({"block_configs": [{"num_local_experts": 8.5}], "model_type": "gpt_oss_puzzle"}, "block_configs"),
    ],
)
def test_wrong_values_are_refused_with_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        layout.read_config(resolve(deepcopy(MINIMAL) | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00}\x00", "is text in UTF-16"),
        (b'{"model_type": "gpt_oss", "x": "\xe9"}', "is not UTF-8 text"),
        (b"", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, found list"),
        (b'{"hidden_size": 64, "hidden_size": 32}', "the key 'hidden_size' occurs twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a number that JSON has"),
        (b'{"rms_norm_eps": 1e999}', "1e999 is not a number"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"config\.json.*{message}"):
        read_config_file(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(MINIMAL).encode())
    assert read_config_file(tmp_path)["num_local_experts"] == 128


ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["yarn", "yarn", "default", "linear", "llama3", "dynamic", "su"]),
        "type": st.sampled_from(["yarn", "linear"]),
        "factor": st.sampled_from([4.0, 32.0, 32, None, "8"]),
        "original_max_position_embeddings": st.sampled_from([128, 4096]),
        "truncate": st.booleans(),
        "beta_fast": st.just(32.0),
        "rope_theta": st.sampled_from([10_000, 150_000.0, None]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.just(4.0),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
        "full_attention": st.just({"rope_type": "default"}),
    },
)
ANY = st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=3), st.just([]))
ENTRIES = st.fixed_dictionaries(
    {"num_local_experts": st.sampled_from([8, 3]), "sliding_window": st.sampled_from([None, 128, 16])},
    optional={"num_experts_per_tok": st.one_of(st.sampled_from([1, 4]), ANY)},
)
"""Of ``block_configs``, or of ``per_layer_config``."""
SPELLINGS = st.fixed_dictionaries(
    {
        "rope_type": st.just("yarn"),
        "factor": st.sampled_from([4.0, 32]),
        "original_max_position_embeddings": st.just(4096),
    },
    optional={
        "beta_fast": st.sampled_from([32.0, 16]),
        "beta_slow": st.sampled_from([1.0, 2]),
        "truncate": st.booleans(),
        "rope_theta": st.sampled_from([10_000, 150_000.0]),
        "partial_rotary_factor": st.just(1.0),
    },
)
"""Of YaRN, each of which the family can have."""
SANE = st.fixed_dictionaries(
    {
        "model_type": st.just("gpt_oss"),
        "num_hidden_layers": st.just(2),
        "num_local_experts": st.just(8),
        "num_experts_per_tok": st.sampled_from([1, 4]),
    },
    optional={
        "rope_scaling": SPELLINGS | st.none(),
        "rope_theta": st.sampled_from([10_000, 150_000.0]),
        "layer_types": st.none() | st.lists(st.sampled_from(layout.LAYER_TYPES), min_size=2, max_size=2),
        "sliding_window": st.sampled_from([16, 128]),
        "head_dim": st.sampled_from([64, 32]),
        "dtype": st.sampled_from(["bfloat16", "float32", None]),
    },
)
"""Configs of which most can be read; of the others few can."""
CONFIGS = st.fixed_dictionaries(
    {"model_type": st.sampled_from(["gpt_oss"] * 6 + ["gpt_oss_puzzle", "mixtral"]), "num_hidden_layers": st.just(2)},
    optional={
        "rope_scaling": st.one_of(st.none(), st.just(YARN), ROPES, ANY),
        "rope_parameters": st.one_of(st.none(), st.just(YARN), ROPES, ANY),
        "rope_theta": st.one_of(st.sampled_from([10_000, 150_000.0]), ANY),
        "layer_types": st.one_of(st.none(), st.lists(st.sampled_from([*layout.LAYER_TYPES, "other"]), max_size=3)),
        "sliding_window": st.one_of(st.just(128), ANY),
        "num_local_experts": st.one_of(st.just(8), ANY),
        "num_experts_per_tok": st.one_of(st.sampled_from([1, 4, 9]), ANY),
        "experts_per_token": st.sampled_from([4, 1]),
        "block_configs": st.one_of(ANY, st.lists(ENTRIES, min_size=2, max_size=2)),
        "per_layer_config": st.one_of(st.none(), st.dictionaries(st.sampled_from(["0", "1"]), ENTRIES)),
        "head_dim": st.sampled_from([64, 63, 1, 0]),
        "eos_token_id": st.one_of(ANY, st.lists(st.integers(-1, 9), max_size=2)),
        "dtype": ANY,
        "unsloth_fixed": ANY,
    },
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SANE | CONFIGS)
def test_any_config_is_resolved_as_its_class_does_or_refused(config: Mapping[str, Any]) -> None:
    try:
        resolved = resolve(deepcopy(config))
        shape, architecture = layout.read_config(resolved)
    except MoesaicError:
        event("refused")
        return
    reference = CLASSES[config["model_type"]].from_dict(deepcopy(config))
    assert same_angles(as_class(resolved), reference)
    assert all(resolved[key] == getattr(reference, key) for key in ("layer_types", "eos_token_id", "sliding_window"))
    assert (shape.hidden_size, architecture.num_layers) == (reference.hidden_size, reference.num_hidden_layers)
    child = layout.child_config(resolved, Architecture.of([Block(4, 2, 64, 16)] * 2))
    assert same_angles(as_class(json.loads(json.dumps(child))), reference)
    assert layout.read_config(resolve(child))[1] == Architecture.of([Block(4, 2, 64, 16)] * 2)
    assert resolve(resolved) == resolved

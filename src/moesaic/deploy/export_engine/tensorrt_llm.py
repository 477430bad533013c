"""TensorRT-LLM's share of a bundle: what its PyTorch backend reads beside the checkpoint, and what it would get wrong.

The engine loads a Hugging Face directory; nothing is built ahead. What it must be told, because it would guess wrongly
for a model class it does not know (read in the source of 1.2.1, not run):

- ``moe_config.backend``: AUTO goes by the class name, and so misses the kernels of gpt-oss;
- ``hf_quant_config.json`` names the weights' format: a null format there loses what it says of the KV cache;
- ``kv_cache_config.dtype``: FP8 is asked for here as well, so that it holds whatever becomes of that file;
- ``enable_chunked_prefill``: off by default, and then a prompt longer than ``max_num_tokens`` is refused
  (``tensorrt_llm/llmapi/llm.py``, ``LLM._check_arguments``);
- ``return_perf_metrics``: off by default, and then the server counts neither requests nor tokens;
- ``kv_cache_config.max_attention_window``: one entry for every layer, the longest request where it is full; a shorter
  list is repeated without a word;
- scales of an FP8 cache are ignored where attention is BF16, as here: they are folded into the weights instead.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import read_json_object, read_text
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest
from moesaic.deploy.export_engine.stage import ExportEngineConfig

VERSIONS = "1.2.1"
"""What was read; whether another one takes the files is not known."""
MODULES = "trtllm"
"""The folder for ``--custom_module_dirs``; the engine imports it as a package of that name."""
QUANT_CONFIG = "hf_quant_config.json"
YAMLS = ("serve.yaml", "bench.yaml")
_KERNELS = {"hopper": ("TRITON", "W4A16_MXFP4"), "blackwell": ("TRTLLM", "W4A8_MXFP4_MXFP8")}
"""By GPU the expert kernels, and how they take MXFP4 weights."""
_NOT_QUANTIZED = ["block.*.attn.out", "block.*.attn.qkv", "block.*.mlp.gate", "embedding", "unembedding"]
"""In the engine's own names."""
_KEYS: dict[str, Any] = {
    "tensor_parallel_size": int,
    "moe_expert_parallel_size": int,
    "enable_attention_dp": bool,
    "max_batch_size": int,
    "max_num_tokens": int,
    "max_seq_len": int,
    "enable_chunked_prefill": bool,
    "return_perf_metrics": bool,
    "trust_remote_code": bool,
    "cuda_graph_config": {"enable_padding": bool, "max_batch_size": int},
    "moe_config": {"backend": str},
    "kv_cache_config": {
        "dtype": str,
        "enable_block_reuse": bool,
        "free_gpu_memory_fraction": float,
        "max_attention_window": list,
        "tokens_per_block": int,
    },
    "stream_interval": int,
    "num_postprocess_workers": int,
}
"""What the engine takes, of which unknown keys are refused, and the type of each value."""

_REQUIRED = {
    "": ("max_seq_len", "enable_chunked_prefill", "moe_config", "kv_cache_config"),
    "moe_config.": ("backend",),
    "kv_cache_config.": ("dtype", "max_attention_window"),
    "cuda_graph_config.": (),
}


def windows(manifest: BundleManifest) -> list[int]:
    """Tokens that each layer's cache keeps."""
    longest = manifest.max_seq_len
    return [min(layer.sliding_window or longest, longest) for layer in manifest.layers]


def files(manifest: BundleManifest, packed: bool) -> dict[str, str]:
    """The engine's files by name."""
    serve = _settings(manifest, manifest.config.prefix_reuse)
    return {
        QUANT_CONFIG: json.dumps(_quant_config(manifest, packed), indent=1) + "\n",
        "serve.yaml": yaml.safe_dump(serve | {"num_postprocess_workers": 4}, sort_keys=False),
        "bench.yaml": yaml.safe_dump(_settings(manifest, prefix_reuse=False), sort_keys=False),
    }


def _settings(manifest: BundleManifest, prefix_reuse: bool) -> dict[str, Any]:
    config = manifest.config
    return {
        "tensor_parallel_size": config.tensor_parallel_size,
        "moe_expert_parallel_size": config.expert_parallel_size,
        "enable_attention_dp": False,
        "max_batch_size": config.max_batch_size,
        "max_num_tokens": config.max_num_tokens,
        "max_seq_len": manifest.max_seq_len,
        "enable_chunked_prefill": True,
        "return_perf_metrics": True,
        "trust_remote_code": False,
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": config.max_batch_size},
        "moe_config": {"backend": _KERNELS[config.gpu][0]},
        "kv_cache_config": {
            "dtype": _cache_dtype(config),
            "enable_block_reuse": prefix_reuse,
            "free_gpu_memory_fraction": config.memory_fraction,
            "max_attention_window": windows(manifest),
        },
        "stream_interval": 10,
    }


def _cache_dtype(config: ExportEngineConfig) -> str:
    return "auto" if config.kv_cache == "bf16" else "fp8"


def _quant_config(manifest: BundleManifest, packed: bool) -> dict[str, Any]:
    return {
        "producer": {"name": "moesaic", "version": manifest.moesaic},
        "quantization": {
            "quant_algo": _KERNELS[manifest.config.gpu][1] if packed else None,
            "kv_cache_quant_algo": None if manifest.config.kv_cache == "bf16" else "FP8",
            "group_size": 32 if packed else None,
            "exclude_modules": _NOT_QUANTIZED,
        },
    }


def check(bundle: Path, manifest: BundleManifest, packed: bool) -> None:
    """Check the engine's files against the manifest.

    Raises:
        ArtifactError: for a key that the engine does not know or a value that does not fit the model.
    """
    for name in YAMLS:
        _check_yaml(bundle / name, manifest)
    written = read_json_object(bundle / QUANT_CONFIG)
    if written.get("quantization") != (expected := _quant_config(manifest, packed)["quantization"]):
        raise ArtifactError(f"{bundle / QUANT_CONFIG} says {written.get('quantization')}; it must say {expected}")


def _check_yaml(path: Path, manifest: BundleManifest) -> None:
    try:
        settings = yaml.safe_load(read_text(path))
    except yaml.YAMLError as broken:
        raise ArtifactError(f"{path} is not valid YAML: {broken}") from broken
    _check_keys(path, settings, _KEYS)
    listed, layers = settings["kv_cache_config"]["max_attention_window"], len(manifest.layers)
    if len(listed) != layers:
        raise ArtifactError(
            f"{path}: max_attention_window has {len(listed)} entries for {layers} layers; the engine would repeat them"
        )
    if wrong := [layer for layer, window in enumerate(windows(manifest)) if listed[layer] != window]:
        layer = wrong[0]
        raise ArtifactError(
            f"{path}: max_attention_window of layer {layer} is {listed[layer]}; "
            f"the layer attends over {windows(manifest)[layer]} tokens"
        )
    for key, value in _settings(manifest, prefix_reuse=False).items():
        given = settings.get(key)
        if key == "kv_cache_config":
            given = settings[key] | {"enable_block_reuse": False}  # as it is asked for, or as a benchmark needs it
        if given != value:
            raise ArtifactError(f"{path}: {key} is {settings.get(key)}; the bundle was exported for {value}")


def _check_keys(path: Path, settings: Any, allowed: Mapping[str, Any], place: str = "") -> None:
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: {place or 'the whole'} must be a mapping, found {type(settings).__name__}")
    for key, value in settings.items():
        name = f"{place}{key}"
        if key not in allowed:
            raise ArtifactError(f"{path}: TensorRT-LLM knows no key {name}; choose from {', '.join(allowed)}")
        if isinstance(allowed[key], dict):
            _check_keys(path, value, allowed[key], f"{name}.")
        elif type(value) is not allowed[key]:
            raise ArtifactError(f"{path}: {name} is {value!r}; it must be of type {allowed[key].__name__}")
    for key in _REQUIRED[place]:
        if key not in settings:
            raise ArtifactError(f"{path}: {place}{key} is missing; the engine's own choice would be wrong")

"""The config of an export: what cannot be served is refused before a model is opened."""

from typing import Any

import pytest
import yaml

from moesaic.core.errors import ConfigError
from moesaic.deploy.export_engine import tensorrt_llm
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest, KvPolicy, Layer, Source
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.models.architecture import Block
from moesaic.pipelines.recipes import RECIPES


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ('"target": "onnx"', "target"),
        ('"target": "vllm", "max_num_tokens": 100', "max_num_tokens 100 is less than max_batch_size 256"),
        ('"target": "vllm", "tensor_parallel_size": 4, "expert_parallel_size": 2', "vLLM 1 or all of it"),
        ('"target": "tensorrt_llm", "tensor_parallel_size": 4, "expert_parallel_size": 3', "takes a divisor of it"),
        ('"target": "tensorrt_llm", "pipeline_parallel_size": 2', "pipeline_parallel_size"),
        ('"target": "vllm", "memory_fraction": 1.0', "memory_fraction"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ExportEngineConfig.parse(f"{{{changes}}}")


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "vllm", "tensor_parallel_size": 8, "expert_parallel_size": 8},
        {"target": "tensorrt_llm", "tensor_parallel_size": 8, "expert_parallel_size": 4},
        {"target": "tensorrt_llm", "kv_cache": "bf16"},
    ],
)
def test_what_can_be_served_is_taken(changes: dict[str, Any]) -> None:
    assert ExportEngineConfig(**changes).max_batch_size == 256


def refused_by_the_engine(settings: dict[str, Any], prompt_tokens: int, new_tokens: int) -> bool:
    """The engine's own rules for one request: ``LLM._check_arguments`` in ``tensorrt_llm/llmapi/llm.py`` of 1.2.1.

    Chunked prefill is off unless it is asked for, and then a prompt must fit one step; prompt and reply together must
    fit the longest sequence.
    """
    chunked = settings.get("enable_chunked_prefill", False)
    too_long_for_a_step = not chunked and prompt_tokens > settings["max_num_tokens"]
    return too_long_for_a_step or prompt_tokens + new_tokens > settings["max_seq_len"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gpt_oss")])
def test_the_engine_answers_every_request_of_the_recipes(name: str) -> None:
    recipe = RECIPES[name]()
    manifest = manifest_of(recipe.export_engine)
    settings = yaml.safe_load(tensorrt_llm.files(manifest, packed=True)["serve.yaml"])
    longest = max(recipe.benchmark_serving.workloads, key=lambda load: load.input_tokens)
    assert longest.input_tokens > settings["max_num_tokens"], "or the rule is not met here"
    assert not refused_by_the_engine(settings, longest.input_tokens, longest.output_tokens)
    assert refused_by_the_engine(settings | {"enable_chunked_prefill": False}, longest.input_tokens, 1)
    assert settings["return_perf_metrics"] is True, "or the server counts nothing, and the counts are not compared"


def manifest_of(config: ExportEngineConfig) -> BundleManifest:
    """Of a model like gpt-oss-120b."""
    return BundleManifest(
        moesaic="0",
        engine=tensorrt_llm.VERSIONS,
        config=config,
        max_seq_len=config.max_seq_len or 131_072,
        kv_cache=KvPolicy(kind=config.kv_cache, scales="folded"),
        layers=tuple(Layer(**Block(128, 4, 2880, None if n % 2 else 128).as_config()) for n in range(36)),
        source=Source(digest="0", steps=(), pruning=None),
    )

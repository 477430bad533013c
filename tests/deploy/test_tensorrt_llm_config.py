"""The config of an export: what cannot be served is refused before a model is opened."""

from typing import Any

import pytest

from moesaic.core.errors import ConfigError
from moesaic.deploy.export_engine.stage import ExportEngineConfig


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

"""Runs in vLLM's environment: what vLLM's own planner of KV memory makes of layers, without a model or a GPU.

A JSON list of questions on standard input: ``windows`` (null: full attention), ``heads`` of a GPU, ``element_bytes``,
``longest`` request, ``room`` in bytes, ``in_flight`` tokens of a step. One answer a line: layers by group, and how many
requests of full length fit.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

_DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What vLLM plans."""
    config = VllmConfig()
    length: Any = SimpleNamespace(max_model_len=asked["longest"], original_max_model_len=asked["longest"])
    config.model_config = length
    config.cache_config.kv_cache_layout = "LBNHC"
    config.scheduler_config.max_num_batched_tokens = asked["in_flight"]
    size = {"block_size": 16, "num_kv_heads": asked["heads"], "head_size": 64, "dtype": _DTYPES[asked["element_bytes"]]}
    layers = {
        f"layers.{number}": FullAttentionSpec(**size)
        if window is None
        else SlidingWindowSpec(**size, sliding_window=window, dcp_sharded=False)
        for number, window in enumerate(asked["windows"])
    }
    (planned,) = kv_cache_utils.get_kv_cache_configs(config, [layers], [asked["room"]])
    return {
        "groups": sorted(len(group.layer_names) for group in planned.kv_cache_groups),
        "requests": kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, planned),
        "in_flight": config.max_in_flight_tokens,
    }


for one in json.load(sys.stdin):
    print(json.dumps(answer(one)))

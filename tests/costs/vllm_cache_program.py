"""Runs in vLLM's environment: what its own planner and manager of KV memory make of layers, without a model or a GPU.

A JSON list of questions on standard input: ``windows`` (null: full attention), ``heads`` of a GPU, ``element_bytes``,
``longest`` request, ``room`` in bytes, ``step_tokens``, and whether to ``fill`` the room. One answer a line:

``groups``    layers of each
``promised``  requests of full length, as vLLM logs them when it starts
``held``      requests that its manager lets grow to full length one after another; null unless asked to
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.request import Request

BLOCK = 16
_DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What vLLM plans."""
    config = VllmConfig()
    length: Any = SimpleNamespace(max_model_len=asked["longest"], original_max_model_len=asked["longest"])
    config.model_config = length
    config.cache_config.kv_cache_layout = "LBNHC"
    config.scheduler_config.max_num_batched_tokens = asked["step_tokens"]
    config.scheduler_config.async_scheduling = True
    size = {"block_size": BLOCK, "num_kv_heads": asked["heads"], "head_size": 64}
    size["dtype"] = _DTYPES[asked["element_bytes"]]
    layers = {
        f"layers.{number}": FullAttentionSpec(**size)
        if window is None
        else SlidingWindowSpec(**size, sliding_window=window, dcp_sharded=False)
        for number, window in enumerate(asked["windows"])
    }
    (planned,) = kv_cache_utils.get_kv_cache_configs(config, [layers], [asked["room"]])
    return {
        "groups": [len(group.layer_names) for group in planned.kv_cache_groups],
        "promised": kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, planned),
        "held": fill(config, planned, asked) if asked["fill"] else None,
    }


def fill(config: VllmConfig, planned: KVCacheConfig, asked: dict[str, Any]) -> int:
    """Let in requests, each once the one before has grown to its full length."""
    manager = KVCacheManager(
        planned, asked["longest"], BLOCK, BLOCK, max_in_flight_tokens=config.max_in_flight_tokens, enable_caching=False
    )
    held = 0
    while grow(manager, str(held), asked):
        held += 1
    return held


def grow(manager: KVCacheManager, name: str, asked: dict[str, Any]) -> bool:
    """Read a prompt in steps, then decode a few tokens, with the step before always under way; False for no room."""
    tokens = asked["longest"] - 2 * BLOCK
    request = Request(name, [0] * tokens, SamplingParams(max_tokens=2 * BLOCK), None)
    prompt = [min(asked["step_tokens"], tokens - start) for start in range(0, tokens, asked["step_tokens"])]
    for number, new in enumerate(prompt + 2 * BLOCK * [1]):
        if manager.allocate_slots(request, new, full_sequence_must_fit=number == 0) is None:
            return False
        request.num_computed_tokens += new
        request.num_in_flight_tokens = new
    return True


for one in json.load(sys.stdin):
    print(json.dumps(answer(one)))

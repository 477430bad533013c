"""KV memory of gpt-oss at full size, as vLLM's own planner has it; nothing but its planner runs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.own_environment import own_variables
from moesaic.costs.block_costs import request_kv_bytes
from moesaic.costs.facts import Facts
from moesaic.costs.generation import Requests, generation
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.throughput import cache_room
from moesaic.deploy.engines.vllm.environment import vllm_environment, why_unsupported
from moesaic.models.architecture import Architecture
from moesaic.models.gpt_oss import GPT_OSS_20B_BLOCKS, GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS

PROGRAM = Path(__file__).with_name("vllm_cache_program.py")
CASES: list[tuple[Architecture, int, int, str]] = [
    (GPT_OSS_120B_BLOCKS, 8, 66_560, "bf16"),
    (GPT_OSS_120B_BLOCKS, 8, 66_560, "fp8"),
    (GPT_OSS_PUZZLE_88B_BLOCKS, 8, 66_560, "fp8"),
    (GPT_OSS_120B_BLOCKS, 1, 33_792, "fp8"),
    (GPT_OSS_20B_BLOCKS, 1, 66_560, "bf16"),
]
"""Layers, GPUs, tokens of the longest request, cache."""


def ask(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [vllm_environment().find_program(), str(PROGRAM)],
        input=json.dumps(questions),
        env=own_variables() | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.engine
@pytest.mark.timeout(3600)
@pytest.mark.skipif(why_unsupported() is not None, reason=str(why_unsupported()))
def test_vllms_own_planner_fits_as_many_requests_as_plans_say() -> None:
    """A step of a few tokens. With more under way, vLLM keeps them for windows too until they are done."""
    questions, computed = [], []
    for model, gpus, longest, cache in CASES:
        target = Target(read_table("h100"), GPT_OSS_120B, gpus, "bf16", "vllm")
        room = cache_room(target, model)
        windows = [block.window for block in model.blocks]
        asked = {"windows": windows, "heads": 8 // gpus, "element_bytes": {"bf16": 2, "fp8": 1}[cache]}
        questions.append(asked | {"longest": longest, "room": int(room / gpus), "in_flight": 16})
        computed.append(room / request_kv_bytes(GPT_OSS_120B, model, longest, cache, "vllm"))
        held = generation(
            "evaluate",
            Facts(GPT_OSS_120B, model, True, model, target),
            model,
            Requests(10**6, longest, "vllm", "bfloat16", cache, gpus),
        )
        assert held.requests == int(computed[-1])
    found = ask(questions)
    assert [answer["requests"] for answer in found] == pytest.approx(computed, rel=0.03)
